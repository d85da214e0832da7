"""How entries lie in a Redis server: the names of keys, and the scripts by which readers and the daemon touch them.

This module decides what a script is given and what its answer means, and nothing runs here: it knows no connection and
no event loop. What readers do with an entry is decided by `integrations.redis`, what a bust does by the daemon.

Theory of operation. All of a namespace lies in one slot of a Redis Cluster, by the braces in P = PREFIX:{NAMESPACE}.

    P:m       hash    epoch, seq (the generation), run, floor, fences, open, keys, tags, cursor, lost
    P:f       zset    fences: what was busted, scored by the generation of the last bust of it
    P:o       zset    open fences: what is being swept now, by hard busts; scored likewise
    P:e:KEY   hash    an entry: v (value), g (the generation it was born in), p (epoch), s ("1": stale), t (tags)
    P:l:KEY   string  the lease of the one reader that makes a stale entry anew
    P:i       zset    all keys, ordered by their bytes
    P:h       hash    key -> its tags, for those that have any; it outlives the entry, to clean up after it
    P:t:TAG   zset    keys with that tag, ordered by their bytes
    P:n       hash    tag -> how many keys P:t:TAG should have

A fence is named "k:KEY", "w:KEY" (the key and its variants), "p:PREFIX", "t:TAG" or "a". A reader takes (epoch, seq)
as its token before it looks into the database; its store is refused if a fence over the key is newer than that. Only so
many fences are kept. The oldest go, and `floor` is raised to the newest that went: tokens older than it are refused,
whatever they fill.

An entry is alive while its epoch is the current one. It dies with an open fence over it that is newer than the entry,
so that a bust of many takes effect at once.

What can be lost. A server that is full may evict any of these keys (maxmemory-policy allkeys-*), and an operator may
delete them. So it is always known how much there should be: P:m counts fences, open ones, keys and tags, and P:n the
keys of each tag. Where the fences fall short, all tokens so far are refused. Where the open ones or the index fall
short, or P:m itself is gone, a new epoch begins, and all entries are misses.

Nothing leads to those any more. `lost` says that there may be some, and with which epoch that began; of a namespace
that is new nobody can tell that there are none. The next bust of everything goes through all names of the server, once,
and frees the entries of other epochs and the tags that no index knows. What lies at the name of an entry and is none,
since somebody else put it there, is neither read nor written nor removed.

So it is where a server may have gone back to an older state, and what was busted since is there again. After a restart
nobody can tell whether the snapshot or the log that it came from was complete, nor whether a replica that took over had
lagged. So P:m says by which run of a server (the run_id that INFO tells) the epoch was begun, each script compares that
with the run it is in, and the first one in another run begins a new epoch, whoever sent it. Of a state that is brought
back under a running server (key by key, or by REPLICAOF and back) the run tells nothing, nor where a user may not ask
for INFO. There helps what clients remember: each hands in the newest token that it knows, and where the server's own is
older, busts have been lost. Epochs are numbered for that.

Where there is no P:m, there is nothing, and no token: a bust there has nothing to do, and leaves nothing behind.

Nothing here looks at a clock. An entry ends by its own TTL, and leaves its key in the index, a ghost. Each store looks
at the next few keys of the index, round and round, and takes ghosts away; so does whatever meets one. Thus there are
never many more ghosts than a part of what is held, as long as anything is stored.

While a script runs, the server answers nobody. So what goes through entries counts what it asks of the server, and ends
early, telling where, once that is enough; at the end of an entry, which has so many tags as a reader may say.

Scripts look into keys that they name themselves. All lie in the slot of the one key that they declare. Their first
write frees memory or does nothing, where a bust depends on it: a server that is full refuses the scripts that begin by
taking memory, and allows the others to go on.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from pybustcall.errors import ConfigurationError
from pybustcall.keys import ENCODINGS, MOST_MARKS, SEPARATORS, ranges_of
from pybustcall.models import Kind, check_namespace

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "DEFAULT_PREFIX",
    "EVERY",
    "MAX_FENCES",
    "Call",
    "Entry",
    "Layout",
    "Page",
    "Range",
    "Script",
    "Token",
    "check_prefix",
    "exists",
    "intruder",
    "ranges_of_prefix",
    "ranges_of_variants",
    "unlink",
]

DEFAULT_PREFIX: Final = "bustcall"
MAX_FENCES: Final = 10_000
"""How many fences are kept in a namespace. Each takes about 100 bytes."""

_PREFIX: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_SWEPT: Final = 4  # keys of the index that each store looks after
_STEPS: Final = 2000  # commands after which a script takes up no other entry; a thousand take about a millisecond
_SWEEPING: Final = 1000  # commands after which a store takes up no other ghost: two with very many tags
_OPEN: Final = 1_000_000  # open fences that are kept; those of daemons that never came back go first
_TRIMMED: Final = 1000  # fences that one script lets go at most

Range = tuple[bytes, bytes]
"""A range of keys as ZRANGEBYLEX takes it: "[" or "(" and the border, or "-" and "+"."""

EVERY: Final[Range] = (b"-", b"+")


# Scripts
#
# Each begins with what all share. ARGV[1] to ARGV[3] are a candidate for a new epoch, and the newest token known to the
# client (an empty epoch if none). Numbers stay far below 2^53.

_SHARED: Final = """
local steps = 0 -- commands so far

local function call(...)
    steps = steps + 1
    return redis.call(...)
end

-- Where an error is an answer, too.
local function try(...)
    steps = steps + 1
    return redis.pcall(...)
end

local M = KEYS[1]
local P = string.sub(M, 1, -3)
local F, O, I, H, N = P .. ':f', P .. ':o', P .. ':i', P .. ':h', P .. ':n'
local epoch, seq, run
local more_keys, more_tags = 0, 0

local function number_of(name)
    return tonumber(string.match(name or '', '^%d+') or '0')
end

-- A new epoch: what was stored before is dead, and no token from before is good.
local function begin_anew(first, lost)
    if lost then
        call('UNLINK', I, H, N)
        call('HSET', M, 'keys', 0, 'tags', 0)
    end
    call('UNLINK', F, O)
    local number = math.max(number_of(epoch), number_of(ARGV[2])) + 1
    epoch, seq = string.format('%.0f:%s', number, ARGV[1]), first
    call('HSET', M, 'epoch', epoch, 'seq', string.format('%.0f', seq), 'floor', 0, 'fences', 0, 'open', 0)
    if lost then call('HSET', M, 'lost', epoch) end
    if run then call('HSET', M, 'run', run) end
end

-- Whether the state may be one from before, of another run or by what the client knows.
local function may_have_gone_back(begun_by)
    return (run and run ~= begun_by) or number_of(epoch) < number_of(ARGV[2])
        or (epoch == ARGV[2] and seq < tonumber(ARGV[3]))
end

-- Whether there is anything; where it is to be stored in, there is afterwards.
local function enter(to_store)
    local m = call('HMGET', M, 'epoch', 'seq', 'run', 'open')
    epoch, seq = m[1] or nil, tonumber(m[2] or '0')
    local server = try('INFO', 'server') -- an error where the user may not
    run = type(server) == 'string' and string.match(server, 'run_id:(%x+)') or nil
    if not (m[1] and m[2]) then
        if not to_store then return false end
        begin_anew(0, true)
    elseif may_have_gone_back(m[3]) then
        begin_anew(math.max(seq, tonumber(ARGV[3])), false)
    elseif call('ZCARD', O) ~= tonumber(m[4] or '0') then
        begin_anew(seq, false) -- what was being swept is served again, and nobody knows what that was
    end
    return true
end

-- Where a part of the index was lost, begin anew.
local function check_index()
    local m = call('HMGET', M, 'keys', 'tags')
    if call('ZCARD', I) ~= tonumber(m[1] or '-1') or call('HLEN', N) ~= tonumber(m[2] or '-1') then
        begin_anew(seq, true)
    end
end

local function check_tag(tag)
    local T = P .. ':t:' .. tag
    local there, expected = call('ZCARD', T), call('HGET', N, tag)
    if not expected then
        if there > 0 then call('UNLINK', T) end -- of an index that was lost
    elseif there ~= tonumber(expected) then
        begin_anew(seq, true)
    end
end

-- Where fences were lost, nothing is known of what was busted till now: no token from before is good.
local function check_fences()
    if call('ZCARD', F) ~= tonumber(call('HGET', M, 'fences') or '-1') then
        call('UNLINK', F)
        call('HSET', M, 'floor', string.format('%.0f', seq), 'fences', 0)
    end
end

local function note_index()
    if more_keys ~= 0 then call('HINCRBY', M, 'keys', more_keys) end
    if more_tags ~= 0 then call('HINCRBY', M, 'tags', more_tags) end
end

local function add_tag(key, tag)
    local T = P .. ':t:' .. tag
    if call('HEXISTS', N, tag) == 0 then
        call('UNLINK', T) -- of an index that was lost
        more_tags = more_tags + 1
    end
    call('HINCRBY', N, tag, call('ZADD', T, 0, key))
end

local function drop_tag(key, tag)
    if call('ZREM', P .. ':t:' .. tag, key) == 1 and call('HINCRBY', N, tag, -1) <= 0 then
        call('HDEL', N, tag)
        more_tags = more_tags - 1
    end
end

local function is_alive(key)
    return try('HGET', P .. ':e:' .. key, 'p') == epoch
end

local function drop(key)
    local E = P .. ':e:' .. key
    if try('HEXISTS', E, 'p') == 1 then call('UNLINK', E) end
    call('UNLINK', P .. ':l:' .. key)
    more_keys = more_keys - call('ZREM', I, key)
    local tags = call('HGET', H, key)
    if tags then
        call('HDEL', H, key)
        for tag in string.gmatch(tags, '[^\\n]+') do drop_tag(key, tag) end
    end
end

local function raise_fence(name, score)
    local there = call('ZSCORE', F, name)
    if not there or tonumber(there) < score then call('ZADD', F, score, name) end
end

local function open_fence(name, score)
    local there = call('ZSCORE', O, name)
    if not there or tonumber(there) < score then call('ZADD', O, score, name) end
end

local function note_open()
    call('HSET', M, 'open', call('ZCARD', O))
end

-- Keep so many fences; the floor makes up for those that go.
local function trim_fences(most)
    local surplus = math.min(call('ZCARD', F) - most, @TRIMMED@)
    if surplus > 0 then
        local gone = call('ZPOPMIN', F, surplus)
        local floor = math.max(tonumber(gone[#gone]), tonumber(call('HGET', M, 'floor')))
        call('HSET', M, 'floor', string.format('%.0f', floor))
    end
    call('HSET', M, 'fences', call('ZCARD', F))
end

-- Whether a fence in `zset` that is newer than `since` covers an entry.
local function is_covered(zset, key, tags, since)
    local newest = call('ZREVRANGE', zset, 0, 0, 'WITHSCORES')[2]
    if not newest or tonumber(newest) <= since then return false end
    local function is_newer(name)
        local score = call('ZSCORE', zset, name)
        return score and tonumber(score) > since
    end
    local function is_newer_variant(name)
        if is_newer('w:' .. name) then return true end
        for _, ending in ipairs({@ENCODINGS@}) do
            if #name > #ending and string.sub(name, -#ending) == ending
                and is_newer('w:' .. string.sub(name, 1, -#ending - 1)) then return true end
        end
        return false
    end
    if is_newer('a') or is_newer('k:' .. key) or is_newer('p:' .. key) then return true end
    if is_newer_variant(key) then return true end
    for tag in string.gmatch(tags, '[^\\n]+') do
        if is_newer('t:' .. tag) then return true end
    end
    local place, marks = string.find(key, '[@MARKS@]'), 0
    while place do
        marks = marks + 1
        if marks > @MOST_MARKS@ then return true end
        local before = string.sub(key, 1, place - 1)
        if is_newer('p:' .. string.sub(key, 1, place)) then return true end
        if place > 1 then
            if is_newer('p:' .. before) then return true end
            if string.sub(key, place, place) == '?' and is_newer_variant(before) then return true end
        end
        place = string.find(key, '[@MARKS@]', place + 1)
    end
    return false
end
"""

# What a reader finds, and its token. key, milliseconds of the lease (0: none is wanted)
# -> epoch, seq, 0 missing | 1 fresh | 2 stale | 3 stale, and this reader makes it anew, value
_LOOKUP: Final = """
enter(true)
local key, lease = ARGV[4], tonumber(ARGV[5])
local e = try('HMGET', P .. ':e:' .. key, 'v', 'g', 'p', 's', 't')
if not e[1] or e[3] ~= epoch or is_covered(O, key, e[5], tonumber(e[2])) then
    return {epoch, seq, 0}
end
if e[4] ~= '1' then return {epoch, seq, 1, e[1]} end
if lease > 0 then
    -- A server that is full refuses it, and its clock may have been set back since another took it.
    local L = P .. ':l:' .. key
    local got = try('SET', L, '1', 'NX', 'PX', lease)
    if not got then
        local left = call('PTTL', L)
        if left > lease or left == -1 then got = try('SET', L, '1', 'PX', lease) end
    end
    if got and got.ok then return {epoch, seq, 3, e[1]} end
end
return {epoch, seq, 2, e[1]}
"""

# Store an entry. key, value, its tags, milliseconds to live (0: for ever), the token's epoch ("": none) and seq
# -> epoch, seq, 1 stored | 0 refused; and the type of what lies there and is no entry, for which it was refused
_STORE: Final = """
enter(true)
check_index()
local key, value, tags, ttl, since = ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[9])
local E = P .. ':e:' .. key
if try('HEXISTS', E, 'p') ~= 1 and call('EXISTS', E) == 1 then return {epoch, seq, 0, call('TYPE', E).ok} end
local former = call('HGET', H, key) or ''
if ARGV[8] ~= '' then
    check_fences()
    local floor = tonumber(call('HGET', M, 'floor'))
    if ARGV[8] ~= epoch or since > seq or since < floor then return {epoch, seq, 0} end
    if since < seq and is_covered(F, key, tags .. '\\n' .. former, since) then return {epoch, seq, 0} end
end

-- A value made from a token is as old as that: a bust that began meanwhile may find only later that it covers it.
local born = ARGV[8] ~= '' and since or seq
call('HSET', E, 'v', value, 'g', string.format('%.0f', born), 'p', epoch, 's', '', 't', tags)
if ttl > 0 then call('PEXPIRE', E, ttl) else call('PERSIST', E) end
call('UNLINK', P .. ':l:' .. key)
more_keys = more_keys + call('ZADD', I, 0, key)
if tags ~= former then
    local kept = {}
    for tag in string.gmatch(tags, '[^\\n]+') do kept[tag] = true end
    for tag in string.gmatch(former, '[^\\n]+') do
        if not kept[tag] then drop_tag(key, tag) end
    end
    if tags ~= '' then call('HSET', H, key, tags) else call('HDEL', H, key) end
end
for tag in string.gmatch(tags, '[^\\n]+') do add_tag(key, tag) end

local cursor = call('HGET', M, 'cursor') or ''
local next_ones = call('ZRANGEBYLEX', I, '(' .. cursor, '+', 'LIMIT', 0, @SWEPT@)
local enough = steps + @SWEEPING@
cursor = #next_ones == @SWEPT@ and next_ones[@SWEPT@] or ''
for _, it in ipairs(next_ones) do
    if not is_alive(it) then drop(it) end
    if steps > enough then
        cursor = it
        break
    end
end
call('HSET', M, 'cursor', cursor)
note_index()
return {epoch, seq, 1}
"""

# Begin a bust. how many fences are kept, 1 hard | 0 soft, fences, of which the first says what is named -> epoch, seq
_BEGIN: Final = """
call('HDEL', M, '') -- allows what follows on a server that is full
if not enter(false) then return {'', 0} end
check_index()
local most, name = tonumber(ARGV[4]), ARGV[6]
if string.sub(name, 1, 2) == 't:' then check_tag(string.sub(name, 3)) end
check_fences()
seq = call('HINCRBY', M, 'seq', 1)
for number = 6, #ARGV do raise_fence(ARGV[number], seq) end
trim_fences(most)
if ARGV[5] == '1' then
    for number = 6, #ARGV do open_fence(ARGV[number], seq) end
    local surplus = math.min(call('ZCARD', O) - @OPEN@, @TRIMMED@)
    if surplus > 0 then call('ZPOPMIN', O, surplus) end -- of daemons that never came back
    note_open()
end
return {epoch, seq}
"""

# Put up more fences of a bust. how many are kept, its generation, 1 hard | 0 soft, fences
_FENCE: Final = """
call('HDEL', M, '')
if not enter(false) then return 0 end
check_fences()
local score = math.min(tonumber(ARGV[5]), seq) -- of an epoch that is over it may lie ahead
for number = 7, #ARGV do
    raise_fence(ARGV[number], score)
    if ARGV[6] == '1' then open_fence(ARGV[number], score) end
end
trim_fences(tonumber(ARGV[4]))
note_open()
return 0
"""

# Take open fences away, unless the same was begun again meanwhile. fence, its generation, fence, its generation, ...
_END: Final = """
call('HDEL', M, '')
if not enter(false) then return 0 end
for number = 4, #ARGV, 2 do
    local score = call('ZSCORE', O, ARGV[number])
    if score and tonumber(score) == tonumber(ARGV[number + 1]) then call('ZREM', O, ARGV[number]) end
end
note_open()
return 0
"""

# Find keys that are held. the tag with "t:" before it, or "" for all keys; how many to look at; from, to, from, to, ...
# -> 0, or the number of the range to go on with; the last key looked at there; keys. It may look at fewer
_SELECT: Final = """
call('HDEL', M, '')
if not enter(false) then return {0, ''} end
check_index()
local Z, rest = I, tonumber(ARGV[5])
if ARGV[4] ~= '' then
    check_tag(string.sub(ARGV[4], 3))
    Z = P .. ':' .. ARGV[4]
end
local found = {0, ''}
for number = 6, #ARGV, 2 do
    local keys = call('ZRANGEBYLEX', Z, ARGV[number], ARGV[number + 1], 'LIMIT', 0, rest)
    for _, key in ipairs(keys) do
        if is_alive(key) then
            found[#found + 1] = key
        else
            drop(key)
            if Z ~= I then drop_tag(key, string.sub(ARGV[4], 3)) end
        end
        rest = rest - 1
        if rest <= 0 or steps > @STEPS@ then
            found[1], found[2] = (number - 4) / 2, key
            break
        end
    end
    if found[1] ~= 0 then break end
end
note_index()
return found
"""

# Remove entries, or mark them as stale, that were born before a generation. generation, 1 soft | 0 hard, keys
# -> for each key 1 if it was held, or was fresh till now, and 0 otherwise. It may end before the last key
_REMOVE: Final = """
call('HDEL', M, '')
if not enter(false) then return string.rep('0', #ARGV - 5) end
check_index()
local before, soft, told = tonumber(ARGV[4]), ARGV[5] == '1', {}
for number = 6, #ARGV do
    local key = ARGV[number]
    local E = P .. ':e:' .. key
    local e = try('HMGET', E, 'g', 'p', 's')
    local done = '0'
    if not e[1] or e[2] ~= epoch then
        drop(key)
    elseif tonumber(e[1]) < before then
        if not soft then
            drop(key)
            done = '1'
        elseif e[3] ~= '1' then
            call('HSET', E, 's', '1')
            done = '1'
        end
        if soft then call('UNLINK', P .. ':l:' .. key) end
    end
    told[#told + 1] = done
    if steps > @STEPS@ then break end
end
note_index()
return table.concat(told)
"""

# Tell what is held. the generation it must be older than ("": any), 1 stale, too | 0 fresh only, keys
# -> for each key 1 or 0
_HELD: Final = """
if not enter(false) then return string.rep('0', #ARGV - 5) end
local before, stale, told = tonumber(ARGV[4]), ARGV[5] == '1', {}
for number = 6, #ARGV do
    local e = try('HMGET', P .. ':e:' .. ARGV[number], 'g', 'p', 's')
    local is_held = e[1] and e[2] == epoch and (stale or e[3] ~= '1') and (not before or tonumber(e[1]) < before)
    told[#told + 1] = is_held and '1' or '0'
end
return table.concat(told)
"""

# Free what nothing leads to: entries of other epochs, and tags that the index does not know. the epoch of which all
# that was lost has been freed ("": not yet), names without P and a colon -> how many of them it has looked at
_FREE: Final = """
call('HDEL', M, '')
if enter(false) then check_index() else call('UNLINK', I, H, N, F, O) end
local looked_at = 0
for number = 5, #ARGV do
    local name, rest = P .. ':' .. ARGV[number], string.sub(ARGV[number], 3)
    if string.sub(ARGV[number], 1, 2) == 'e:' then
        local its = try('HGET', name, 'p')
        if type(its) == 'string' and its ~= epoch then drop(rest) end
    elseif call('HEXISTS', N, rest) == 0 then
        call('UNLINK', name)
    end
    looked_at = looked_at + 1
    if steps > @STEPS@ then break end
end
note_index()
if ARGV[4] ~= '' and call('HGET', M, 'lost') == ARGV[4] then call('HDEL', M, 'lost') end
return looked_at
"""


# Plain keys of other programs: remove them, or look for them -> for each key 1 if it was there, and 0 otherwise
_UNLINK: Final = """
local told = {}
for number, name in ipairs(KEYS) do told[number] = redis.call('UNLINK', name) end
return table.concat(told)
"""
_EXISTS: Final = """
local told = {}
for number, name in ipairs(KEYS) do told[number] = redis.call('EXISTS', name) end
return table.concat(told)
"""


@final
@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, and the digest by which a server that has it knows it."""

    source: str
    digest: str

    @classmethod
    def of(cls, source: str) -> Script:
        """Make a script of its source."""
        return cls(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def _script(body: str) -> Script:
    source = (_SHARED + body).strip() + "\n"
    for name, value in {
        "@ENCODINGS@": ", ".join(f"'{it}'" for it in ENCODINGS),
        "@MARKS@": SEPARATORS,
        "@MOST_MARKS@": str(MOST_MARKS),
        "@STEPS@": str(_STEPS),
        "@SWEEPING@": str(_SWEEPING),
        "@SWEPT@": str(_SWEPT),
        "@OPEN@": str(_OPEN),
        "@TRIMMED@": str(_TRIMMED),
    }.items():
        source = source.replace(name, value)
    return Script.of(source)


LOOKUP: Final = _script(_LOOKUP)
STORE: Final = _script(_STORE)
BEGIN: Final = _script(_BEGIN)
FENCE: Final = _script(_FENCE)
END: Final = _script(_END)
SELECT: Final = _script(_SELECT)
REMOVE: Final = _script(_REMOVE)
HELD: Final = _script(_HELD)
FREE: Final = _script(_FREE)
UNLINK: Final = Script.of(_UNLINK)
EXISTS: Final = Script.of(_EXISTS)


@final
@dataclass(frozen=True, slots=True)
class Call:
    """A script, and what it is to be run with."""

    script: Script
    keys: tuple[bytes, ...]
    arguments: tuple[bytes | str | int, ...]


@final
@dataclass(frozen=True, slots=True)
class Token:
    """What was the case when a fill began: the epoch, which is "NUMBER:RANDOM", and its generation."""

    epoch: bytes
    generation: int

    @classmethod
    def of(cls, reply: Any) -> Token:
        """Read it off the answer to `lookup`, `store` or `begin`."""
        return cls(reply[0], reply[1])

    def newest(self, other: Token | None) -> Token:
        """Tell which of both to hand in next time, where this one was told last."""
        if other is None:
            return self
        if other.epoch == self.epoch:
            return max(self, other, key=lambda it: it.generation)
        return max(self, other, key=lambda it: int(it.epoch.partition(b":")[0]))


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """What a reader found. `refresh`: it is stale, and this reader is the one that makes it anew."""

    value: bytes
    stale: bool
    refresh: bool

    @classmethod
    def of(cls, reply: Any) -> Entry | None:
        """Read it off the answer to `lookup`; None if nothing is held."""
        return cls(reply[3], reply[2] != 1, reply[2] == 3) if reply[2] else None


@final
@dataclass(frozen=True, slots=True)
class Page:
    """A part of what `select` finds, and the ranges that are left."""

    keys: tuple[str, ...]
    rest: tuple[Range, ...]

    @classmethod
    def of(cls, reply: Any, asked: Sequence[Range]) -> Page:
        """Read it off the answer to `select` of the ranges `asked`."""
        number, last, *keys = reply
        rest = ((b"(" + last, asked[number - 1][1]), *asked[number:]) if number else ()
        return cls(tuple(key.decode() for key in keys), rest)


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """One namespace in a server.

    - `prefix`: what all names begin with: 1 to 64 letters, digits, dots, colons, dashes and underscores
    - `namespace`: whose entries

    Raises `ConfigurationError` (setting "prefix") or `InvalidRequest`. In what follows, `fresh` is a random text for
    the epoch, should a new one begin, and `known` the newest token that the caller has been told.
    """

    prefix: str
    namespace: str

    def __post_init__(self) -> None:
        check_prefix(self.prefix)
        check_namespace(self.namespace)

    @property
    def root(self) -> str:
        """What all names of this namespace begin with, before a colon."""
        return f"{self.prefix}:{{{self.namespace}}}"

    def index(self, tag: str | None = None) -> bytes:
        """Tell the name of the index of all keys, or of those with a tag."""
        return (f"{self.root}:i" if tag is None else f"{self.root}:t:{tag}").encode()

    @property
    def lost(self) -> tuple[str | bytes, ...]:
        """The command that tells the epoch, None if nothing is there, and that from which on names may be lost."""
        return "HMGET", f"{self.root}:m", "epoch", "lost"

    @property
    def names(self) -> bytes:
        """What the names of all entries and tags look like, as SCAN takes it."""
        return f"{self.root}:[et]:*".encode()

    def lookup(self, fresh: str, known: Token | None, key: str, *, lease: float = 0.0) -> Call:
        """Look an entry up; if it is stale, try to take the lease, for that many seconds; 0 is not to try."""
        return self._call(LOOKUP, fresh, known, key, _milliseconds(lease))

    def store(
        self,
        fresh: str,
        known: Token | None,
        key: str,
        value: bytes,
        *,
        tags: Sequence[str],
        ttl: float | None,
        token: Token | None,
    ) -> Call:
        """Store an entry, for `ttl` seconds or for ever, unless it was busted after `token`. No tag twice."""
        packed = "\n".join(tags)  # no tag has a control character
        since = (token.epoch, token.generation) if token else ("", 0)
        return self._call(STORE, fresh, known, key, value, packed, 0 if ttl is None else _milliseconds(ttl), *since)

    def begin(
        self,
        fresh: str,
        known: Token | None,
        kind: Kind,
        target: str,
        *,
        soft: bool,
        wide: bool,
        most: int = MAX_FENCES,
    ) -> Call:
        """Begin a bust, `wide` against variants of the target as well; keep at most `most` fences."""
        fences = [_fence(kind, target)]
        if wide and kind in {"key", "prefix"}:
            fences.append(f"w:{target}")
        return self._call(BEGIN, fresh, known, most, int(not soft), *fences)

    def fence(
        self,
        fresh: str,
        known: Token | None,
        keys: Sequence[str],
        *,
        generation: int,
        soft: bool,
        most: int = MAX_FENCES,
    ) -> Call:
        """Refuse late fills of these keys and of their variants, too, and let readers miss them unless it is soft."""
        return self._call(FENCE, fresh, known, most, generation, int(not soft), *(f"w:{key}" for key in keys))

    def end(self, fresh: str, known: Token | None, fences: Iterable[tuple[Kind, str, int]]) -> Call:
        """End busts of what is named, with its variants, each as the generation that it began as."""
        names = [
            (name, generation)
            for kind, target, generation in fences
            for name in dict.fromkeys((_fence(kind, target), f"w:{target}"))
        ]
        return self._call(END, fresh, known, *(part for pair in names for part in pair))

    def select(
        self, fresh: str, known: Token | None, ranges: Sequence[Range], *, tag: str | None = None, limit: int
    ) -> Call:
        """Find keys in these ranges, of all or of those with a tag; look at `limit` at most, or at fewer."""
        within = "" if tag is None else f"t:{tag}"
        return self._call(SELECT, fresh, known, within, limit, *(border for it in ranges for border in it))

    def remove(self, fresh: str, known: Token | None, keys: Sequence[str], *, generation: int, soft: bool) -> Call:
        """Remove entries, or mark them as stale, that were born before `generation`: the first at least of `keys`."""
        return self._call(REMOVE, fresh, known, generation, int(soft), *keys)

    def held(
        self, fresh: str, known: Token | None, keys: Sequence[str], *, generation: int | None, stale: bool
    ) -> Call:
        """Tell which entries are held, if `stale` also those, and were born before `generation`, if there is one."""
        return self._call(HELD, fresh, known, "" if generation is None else generation, int(stale), *keys)

    def free(self, fresh: str, known: Token | None, names: Sequence[bytes], *, all_of: bytes = b"") -> Call:
        """Free which of these names are of no use: the first at least of them, each whole.

        `all_of`: what `lost` told before the walk through all names that ends with these.
        """
        return self._call(FREE, fresh, known, all_of, *(name[len(self.root.encode()) + 1 :] for name in names))

    def _call(self, script: Script, fresh: str, known: Token | None, *arguments: bytes | str | int) -> Call:
        newest = (known.epoch, known.generation) if known else ("", 0)
        return Call(script, (f"{self.root}:m".encode(),), (fresh, *newest, *arguments))


def check_prefix(prefix: object) -> str:
    """Return the prefix if names can begin with it; raise `ConfigurationError` (setting "prefix") otherwise.

    A brace in it would be taken for the tag of a slot.
    """
    if isinstance(prefix, str) and _PREFIX.fullmatch(prefix):
        return prefix
    raise ConfigurationError(
        f"prefix must be 1 to 64 ASCII letters, digits, dots, colons, dashes and underscores, not {prefix!r}",
        setting="prefix",
    )


def _fence(kind: Kind, target: str) -> str:
    return "a" if kind == "all" else f"{kind[0]}:{target}"


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000)) if seconds else 0


def intruder(reply: Any) -> str | None:
    """Read off the answer to `store` the type of what lies there and is no entry; None if that was not the matter."""
    return reply[3].decode() if len(reply) > 3 else None


def unlink(names: Sequence[bytes]) -> Call:
    """Remove plain keys."""
    return Call(UNLINK, tuple(names), ())


def exists(names: Sequence[bytes]) -> Call:
    """Look for plain keys."""
    return Call(EXISTS, tuple(names), ())


def ranges_of_prefix(prefix: str) -> tuple[Range, ...]:
    """List the ranges of keys that a prefix covers, itself among them."""
    inside = tuple((b"[" + low.encode(), b"(" + high.encode()) for low, high in ranges_of(prefix))
    return inside if prefix[-1] in SEPARATORS else (_only(prefix), *inside)


def ranges_of_variants(key: str) -> tuple[Range, ...]:
    """List the ranges of keys that are variants of `key`: in another encoding, with a query, or both."""
    encoded = [key + ending for ending in ENCODINGS]
    queries = [(b"[" + f"{it}?".encode(), b"(" + f"{it}@".encode()) for it in (key, *encoded)]  # @ is next to ?
    return (*(_only(it) for it in encoded), *queries)


def _only(key: str) -> Range:
    """Tell the range that is one key."""
    return b"[" + key.encode(), b"[" + key.encode()
