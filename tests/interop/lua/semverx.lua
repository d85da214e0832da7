-- SemverX versions, ranges and hot swaps: the same answers as pybustcall/semverx.py, which says what the rules are for.
-- Whatever cannot be read returns nil and why.
local semverx = {}

local STATES = { "stable", "legacy", "experimental" } -- the most trusted first
local RANK = { stable = 1, legacy = 2, experimental = 3 }
local PARTS = { "major", "minor", "patch" }
local MAX_NUMBER <const> = 2 ^ 53 - 1
local MAX_ALTERNATIVES <const> = 32
local UNREADABLE = {}

local function refuse(why)
  error(setmetatable({ why = why }, UNREADABLE))
end

--- Make of a reader that refuses one that returns nil and why.
local function guarded(read)
  return function(text)
    local ok, found = pcall(read, text)
    if ok then return found end
    if getmetatable(found) == UNREADABLE then return nil, found.why end
    error(found, 0)
  end
end

local function split(text, separator)
  local found, from = {}, 1
  while true do
    local first, last = text:find(separator, from, true)
    found[#found + 1] = text:sub(from, (first or 0) - 1)
    if not first then return found end
    from = last + 1
  end
end

local function number(word)
  local value = (word == "0" or word:find("^[1-9][0-9]*$")) and tonumber(word)
  if not value or value > MAX_NUMBER then refuse "no number of a version" end
  return math.tointeger(value)
end

local function state_of(word)
  return RANK[word:lower()] and word:lower() or refuse "no state"
end

--- The state that SemVer's spelling gives to all three numbers.
local function implied(prerelease)
  if #prerelease == 0 then return "stable" end
  local first = tostring(prerelease[1]):lower()
  return RANK[first] and first or "experimental"
end

local function identifiers(joined)
  local found = joined and split(joined, ".") or {}
  for _, one in ipairs(found) do
    if not one:find "^[0-9A-Za-z-]+$" then refuse "an identifier is empty or has other characters" end
  end
  return found
end

--- Divide a version, or what looks like one, into its parts between dots, its pre-release and its build.
local function divide(text)
  local rest, build = text:match "^([^+]*)%+(.*)$"
  local core, prerelease = (rest or text):match "^([^-]*)-(.*)$"
  core = core or rest or text
  local read = identifiers(prerelease)
  for index, one in ipairs(read) do
    if one:find "^[0-9]+$" then read[index] = number(one) end
  end
  return {
    parts = split(core:gsub("^[vV](%d)", "%1"), "."),
    prerelease = read,
    build = table.concat(identifiers(build), "."),
    bare = not prerelease and not build,
  }
end

local function every_second(parts, from)
  return { parts[from], parts[from + 2], parts[from + 4] }
end

local function map(list, change)
  local changed = {}
  for index, one in ipairs(list) do changed[index] = change(one) end
  return changed
end

local function read_version(text)
  if #text > 256 or text:find "[^0-9A-Za-z.+-]" then refuse "too long, or characters that no version has" end
  local divided = divide(text)
  if #divided.parts == 3 then
    local state = implied(divided.prerelease)
    return {
      numbers = map(divided.parts, number), states = { state, state, state },
      prerelease = divided.prerelease, build = divided.build,
    }
  end
  if #divided.parts ~= 6 or not divided.bare then refuse "neither three parts nor six" end
  local numbers, states = every_second(divided.parts, 1), every_second(divided.parts, 2)
  return { numbers = map(numbers, number), states = map(states, state_of), prerelease = {}, build = "" }
end

semverx.parse_version = guarded(read_version)

local function semver(numbers, prerelease)
  local text = table.concat(numbers, ".")
  return #prerelease > 0 and text .. "-" .. table.concat(prerelease, ".") or text
end

function semverx.six_parts(version)
  local parts = {}
  for index, one in ipairs(version.numbers) do parts[index] = one .. "." .. version.states[index] end
  return table.concat(parts, ".")
end

function semverx.canonical(version)
  for _, state in ipairs(version.states) do
    if state ~= implied(version.prerelease) then return semverx.six_parts(version) end
  end
  return semver(version.numbers, version.prerelease) .. (version.build ~= "" and "+" .. version.build or "")
end

--- SemVer 2.0, section 11: below 0 if `a` comes before `b`, 0 if neither does. States and build have no part in it.
function semverx.compare(a, b)
  for index, one in ipairs(a.numbers) do
    if one ~= b.numbers[index] then return one < b.numbers[index] and -1 or 1 end
  end
  local ours, theirs = a.prerelease, b.prerelease
  if #ours == 0 or #theirs == 0 then return (#ours == 0 and 1 or 0) - (#theirs == 0 and 1 or 0) end
  for index = 1, math.min(#ours, #theirs) do
    local one, other = ours[index], theirs[index]
    if type(one) ~= type(other) then return type(one) == "number" and -1 or 1 end
    if one ~= other then return one < other and -1 or 1 end
  end
  return #ours - #theirs
end

-- Ranges: a list of alternatives, each a list of terms

local HOLDS = {
  ["="] = function(by) return by == 0 end,
  [">"] = function(by) return by > 0 end,
  ["<"] = function(by) return by < 0 end,
  [">="] = function(by) return by >= 0 end,
  ["<="] = function(by) return by <= 0 end,
}
HOLDS["^"], HOLDS["~"] = HOLDS[">="], HOLDS[">="]
local KEPT = { ["^"] = 1, ["~"] = 2 }

--- Read numbers of which the last may be wildcards; return those that are none.
local function leading(words)
  local numbers, wild = {}, false
  for _, word in ipairs(words) do
    if word:find "^[xX*]$" then
      wild = true
    elseif wild then
      refuse "a number after a wildcard"
    else
      numbers[#numbers + 1] = number(word)
    end
  end
  return numbers
end

--- Read a state of a pattern: those that it allows, in order; none of them is named by `*`.
local function states_of(word)
  if word == "*" then return {} end
  local inner, named, found = word:match "^{(.*)}$", {}, {}
  for _, one in ipairs(map(inner and split(inner, "|") or { word }, state_of)) do
    if named[one] then refuse "a state twice" end
    named[one] = true
  end
  for _, state in ipairs(STATES) do
    if named[state] then found[#found + 1] = state end
  end
  return found
end

local function whole(operator, word)
  local version = read_version(word)
  return { operator = operator or "=", numbers = version.numbers, prerelease = version.prerelease }
end

local function read_term(operator, word)
  if word:lower() == "latest" and not operator then return { operator = "=", numbers = {}, prerelease = {} } end
  local divided = divide(word)
  if #divided.parts == 6 and divided.bare and (not operator or operator == "=") then
    local numbers, states = every_second(divided.parts, 1), every_second(divided.parts, 2)
    return { operator = "=", numbers = leading(numbers), prerelease = {}, states = map(states, states_of) }
  end
  if #divided.parts == 6 then return whole(operator, word) end
  if #divided.parts > 3 then refuse "too many parts" end
  local numbers = leading(divided.parts)
  if #numbers == 3 then return whole(operator, word) end
  if operator and #numbers == 0 then refuse "an operator needs a number" end
  if not divided.bare then refuse "a partial version has no pre-release and no build" end
  return { operator = operator or "=", numbers = numbers, prerelease = {} }
end

local function read_terms(text)
  local terms = {}
  for _, piece in ipairs(split(text, ",")) do
    if not piece:find "[^ ]" then refuse "an empty term" end
    local from = piece:find "[^ ]"
    while from do
      local operator = piece:match("^[<>]=?", from) or piece:match("^[=^~]", from)
      local first, last = piece:find("[^ ]+", from + #(operator or ""))
      if not first then refuse "an operator without a version" end
      terms[#terms + 1] = read_term(operator, piece:sub(first, last))
      from = piece:find("[^ ]", last + 1)
    end
  end
  return terms
end

local function read_range(text)
  if #text > 1024 or text:find "[^ -~]" then refuse "too long, or characters that no range has" end
  local alternatives = split(text, "||")
  if #alternatives > MAX_ALTERNATIVES then refuse "too many alternatives" end
  return map(alternatives, read_terms)
end

semverx.parse_range = guarded(read_range)

local function contains(list, value)
  for _, one in ipairs(list) do
    if one == value then return true end
  end
  return false
end

local function term_matches(term, version)
  local length = #term.numbers
  local function same(count)
    for index = 1, math.min(count, length) do
      if term.numbers[index] ~= version.numbers[index] then return false end
    end
    return true
  end
  if term.states then
    for index, some in ipairs(term.states) do
      if #some > 0 and not contains(some, version.states[index]) then return false end
    end
    return same(3)
  end
  local theirs = { numbers = { table.unpack(version.numbers, 1, length) }, prerelease = {} }
  if length == 3 then theirs.prerelease = version.prerelease end -- what a partial version lacks has no part in it
  return HOLDS[term.operator](semverx.compare(theirs, term)) and same(KEPT[term.operator] or 0)
end

function semverx.matches(range, version)
  for _, terms in ipairs(range) do
    local all = true
    for _, term in ipairs(terms) do all = all and term_matches(term, version) end
    if all then return true end
  end
  return false
end

local function term_text(term)
  if term.states then
    local parts = {}
    for index, some in ipairs(term.states) do
      local shown = #some > 1 and "{" .. table.concat(some, "|") .. "}" or some[1] or "*"
      parts[index] = (term.numbers[index] or "*") .. "." .. shown
    end
    return table.concat(parts, ".")
  end
  if #term.numbers == 0 then return "*" end
  local text = semver(term.numbers, term.prerelease)
  if term.operator ~= "=" then return term.operator .. text end
  return #term.numbers < 3 and text .. ".x" or text
end

function semverx.range_text(range)
  return table.concat(map(range, function(terms) return table.concat(map(terms, term_text), " ") end), " || ")
end

local function rank_of_whole(version)
  return math.max(table.unpack(map(version.states, function(state) return RANK[state] end)))
end

--- The highest match: of the stable ones and those of a state that the range names, else legacy, else experimental.
function semverx.best(range, versions)
  local named = {}
  for _, terms in ipairs(range) do
    for _, term in ipairs(terms) do
      if #term.prerelease > 0 and term.operator ~= "<" then named[implied(term.prerelease)] = true end
      for _, some in ipairs(term.states or {}) do
        for _, state in ipairs(some) do named[state] = true end
      end
    end
  end
  local function rank(version)
    local own = rank_of_whole(version)
    return named[STATES[own]] and 1 or own
  end
  local found
  for _, version in ipairs(versions) do
    if semverx.matches(range, version) then
      local by = found and rank(found) - rank(version)
      by = by == 0 and semverx.compare(version, found) or by
      by = by == 0 and rank_of_whole(found) - rank_of_whole(version) or by
      if not by or by > 0 then found = version end -- of equals the first
    end
  end
  return found
end

-- Code points that no name has: controls, spaces, @, what is not seen
local UNSEEN = {
  { 0, 0x20 }, { 0x40, 0x40 }, { 0x7f, 0xa0 }, { 0xad, 0xad }, { 0x61c, 0x61c }, { 0x1680, 0x1680 }, { 0x180e, 0x180e },
  { 0x2000, 0x200f }, { 0x2028, 0x202f }, { 0x205f, 0x206f }, { 0x3000, 0x3000 }, { 0xfeff, 0xfeff },
  { 0xfff9, 0xfffb },
}

local function is_name(text)
  if text == "" or not utf8.len(text) then return false end -- which takes no surrogates either
  for _, code in utf8.codes(text) do
    for _, span in ipairs(UNSEEN) do
      if code >= span[1] and code <= span[2] then return false end
    end
  end
  return true
end

--- Read `name@range`, or `@scope/name@range`; without a range any version will do.
semverx.parse_spec = guarded(function(text)
  local name, range = text:match "^(.+)@([^@]*)$"
  name, range = name or text, range or "*"
  local bare = name:gsub("^@", "")
  if #name > 256 or not is_name(bare) then refuse "no name" end
  if bare ~= name and not bare:find "^[^/]+/." then refuse "no name in the scope" end
  return { name = name, range = read_range(range) }
end)

local SWAPS = {
  stable = { stable = { "same_major" }, legacy = { "rollback" }, experimental = { "allow_experimental" } },
  legacy = { stable = { "migrate" }, legacy = { "rollback" }, experimental = { "allow_experimental" } },
  experimental = {
    stable = { "same_major", "validated" }, legacy = { "rollback" }, experimental = { "allow_experimental" },
  },
}

--- Which parts keep the candidate from taking the current version's place at run time; none: it may.
function semverx.swap_failures(current, candidate, flags)
  local failed = {}
  for index, part in ipairs(PARTS) do
    local passes = true
    for _, need in ipairs(SWAPS[current.states[index]][candidate.states[index]]) do
      local given = flags[need]
      if need == "same_major" then given = current.numbers[1] == candidate.numbers[1] end
      passes = passes and given == true
    end
    if not passes then failed[#failed + 1] = part end
  end
  return failed
end

return semverx
