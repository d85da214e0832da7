-- Checks this daemon's own implementation against the test vectors that every language shares.
local cjson = require "cjson"
local faults, replies, semverx = require "faults", require "replies", require "semverx"
local null = cjson.null

--- Make the bytes of the body that an entry describes.
local function body_of(entry)
  if entry.body_hex then
    return (entry.body_hex:gsub("%x%x", function(digits) return string.char(tonumber(digits, 16)) end))
  end
  if not entry.fill then return entry.body end
  local before, after = entry.body:match "^(.-)<fill>(.*)$"
  return before .. entry.fill.text:rep(entry.fill.times) .. after
end

local function same(a, b)
  if type(a) ~= "table" or type(b) ~= "table" then return a == b end
  for name, value in pairs(a) do
    if not same(value, b[name]) then return false end
  end
  for name in pairs(b) do
    if a[name] == nil then return false end
  end
  return true
end

local CHECKS = {}

CHECKS["requests.json"] = function(vectors, daemon, check)
  for _, entry in ipairs(vectors.requests) do
    local body, status, field, read = body_of(entry), 200, null, nil
    if #body > 65536 then
      status = 413
    else
      local refusal
      read, refusal = daemon.read_bust(body)
      if not read then status, field = refusal.status, refusal.field or null end
    end
    local allowed = {}
    for _, one in ipairs(entry.strict.status) do allowed[one] = true end
    check(entry.description .. ": status", allowed[status] or status, true)
    if status == 422 then check(entry.description .. ": field", field, entry.strict.field) end
    if status == 200 and entry.reads then
      for name, value in pairs(entry.reads) do check(entry.description .. ": " .. name, read[name], value) end
      check(entry.description .. ": key", daemon.cache_key_of(read.target), entry.cache_key)
    end
  end
end

CHECKS["replies.json"] = function(vectors, _, check)
  for _, entry in ipairs(vectors.replies) do
    local doubt = replies.doubt(entry.target, body_of(entry))
    check(entry.description, doubt and "malformed" or "acknowledged", entry.reads)
  end
end

CHECKS["errors.json"] = function(vectors, _, check)
  for _, entry in ipairs(vectors.errors) do
    local kind = faults.kind_of_status(entry.status)
    local row = faults.TABLE[kind]
    local found = { kind, row.stage, faults.may_be_applied(entry.status) and "maybe" or "no", row.next }
    check(entry.description, found, { entry.kind, entry.stage, entry.applied, entry.next })
  end
end

CHECKS["faults.json"] = function(vectors, _, check)
  for _, entry in ipairs(vectors.stages) do
    check("band of " .. entry.stage, faults.is_stage(entry.stage) and faults.band_of(entry.stage), entry.band)
  end
  for _, entry in ipairs(vectors.refused) do check(entry.description, faults.is_stage(entry.stage), false) end
  for _, entry in ipairs(vectors.escalate) do
    local found = faults.escalate(entry.stage, entry.incidents)
    check(("escalate(%d, %d)"):format(entry.stage, entry.incidents), found, entry.result)
  end
  for _, entry in ipairs(vectors.kinds) do
    local row = { stage = entry.stage, next = entry.next, incident = entry.incident }
    check(entry.kind, faults.TABLE[entry.kind], row)
  end
  for _, entry in ipairs(vectors.weights) do
    local stage = faults.escalate(faults.TABLE[entry.kind].stage, entry.incidents)
    local found = { stage, faults.weight_in_call(entry.kind, entry.incidents) }
    check(entry.kind .. " after " .. entry.incidents, found, { entry.stage, entry.in_call })
  end
  for _, entry in ipairs(vectors.calls) do
    check(entry.outcome, faults.call_stage(entry.outcome, entry.faults), entry.stage)
  end
  for _, entry in ipairs(vectors.tolerances) do
    local found = faults.raises(entry.stage, entry.fault_tolerance)
    check(("raises(%d, %d)"):format(entry.stage, entry.fault_tolerance), found, entry.raises)
  end
  for _, entry in ipairs(vectors.statuses) do
    local kind = faults.kind_of_status(entry.status)
    local found = { kind or null, kind and faults.TABLE[kind].stage or faults.CLEAN }
    check(("status %d"):format(entry.status), found, { entry.kind, entry.stage })
  end
end

CHECKS["versions.json"] = function(vectors, _, check)
  for _, entry in ipairs(vectors.valid) do
    local version = assert(semverx.parse_version(entry.text))
    check(entry.text, version.numbers, { entry.major, entry.minor, entry.patch })
    check(entry.text, version.states, entry.states)
    local found = { table.concat(version.prerelease, "."), version.build }
    check(entry.text, found, { entry.prerelease, entry.build })
    check(entry.text, semverx.canonical(version), entry.canonical)
    check(entry.text, semverx.six_parts(version), entry.six_parts)
  end
  for _, entry in ipairs(vectors.invalid) do
    check(("%q (%s)"):format(entry.text, entry.why), semverx.parse_version(entry.text), nil)
  end
  local function compare(one, other)
    local by = semverx.compare(assert(semverx.parse_version(one)), assert(semverx.parse_version(other)))
    return by > 0 and 1 or by < 0 and -1 or 0
  end
  for _, versions in ipairs(vectors.ascending) do
    for index, one in ipairs(versions) do
      for above, other in ipairs(versions) do
        check(one .. " and " .. other, compare(one, other), index > above and 1 or index < above and -1 or 0)
      end
    end
  end
  for _, pair in ipairs(vectors.equal) do check(table.concat(pair, " and "), compare(pair[1], pair[2]), 0) end
end

CHECKS["ranges.json"] = function(vectors, _, check)
  for _, entry in ipairs(vectors.matches) do
    local range, version = assert(semverx.parse_range(entry.range)), assert(semverx.parse_version(entry.version))
    check(entry.version .. " in " .. entry.range, semverx.matches(range, version), entry.matches)
    local again = assert(semverx.parse_range(semverx.range_text(range)))
    check(entry.version .. " in " .. entry.range .. ", written again", semverx.matches(again, version), entry.matches)
  end
  for _, entry in ipairs(vectors.invalid) do
    check(("%q (%s)"):format(entry.text, entry.why), semverx.parse_range(entry.text), nil)
  end
  for _, entry in ipairs(vectors.specs) do
    local spec = assert(semverx.parse_spec(entry.spec))
    check(entry.spec, { spec.name, semverx.range_text(spec.range) }, { entry.name, entry.range })
  end
  for _, entry in ipairs(vectors.invalid_specs) do
    check(("%q (%s)"):format(entry.spec, entry.why), semverx.parse_spec(entry.spec), nil)
  end
  for _, entry in ipairs(vectors.best) do
    local versions = {}
    for index, text in ipairs(entry.versions) do versions[index] = assert(semverx.parse_version(text)) end
    local found = semverx.best(assert(semverx.parse_range(entry.range)), versions)
    check("best for " .. entry.range, found and semverx.canonical(found) or null, entry.best)
  end
  for _, entry in ipairs(vectors.swaps) do
    local current, candidate = semverx.parse_version(entry.current), semverx.parse_version(entry.candidate)
    local failed = semverx.swap_failures(assert(current), assert(candidate), entry.flags)
    local found = { #failed == 0, failed }
    check(("%s for %s"):format(entry.candidate, entry.current), found, { entry.allowed, entry.failed })
  end
end

local FILES = { "versions.json", "ranges.json", "requests.json", "replies.json", "errors.json", "faults.json" }

--- Check every file; print what does not match, and how much was checked; tell whether everything matched.
return function(directory, daemon)
  local all_match = true
  for _, name in ipairs(FILES) do
    local file = assert(io.open(directory .. "/" .. name, "rb"))
    local vectors, count, wrong = cjson.decode(file:read "a"), 0, 0
    file:close()
    CHECKS[name](vectors, daemon, function(what, found, expected)
      count = count + 1
      if same(found, expected) then return end
      wrong = wrong + 1
      print(("%s: %s: found %s, expected %s"):format(name, what, cjson.encode { found }, cjson.encode { expected }))
    end)
    print(("%s: %d checked, %d wrong"):format(name, count, wrong))
    all_match = all_match and wrong == 0 and count > 0
  end
  return all_match
end
