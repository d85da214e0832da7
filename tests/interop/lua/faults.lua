-- The fault scale 0 to 12: the same answers as pybustcall/faults.py, for clients in Lua.
local faults = { CLEAN = 12 }

local BANDS = { "panic", "exception", "warning", "silent" }
local OUTCOMES = { acknowledged = { 9, 12 }, kept = { 6, 8 }, failed = { 0, 5 } }

--- Where each kind of fault starts, whether another daemon may do better, whether it speaks against the daemon.
faults.TABLE = {
  slow = { stage = 10, next = false, incident = false },
  no_slot = { stage = 8, next = false, incident = false },
  unreachable = { stage = 8, next = true, incident = true },
  disconnected = { stage = 8, next = true, incident = true },
  timed_out = { stage = 8, next = true, incident = true },
  throttled = { stage = 8, next = true, incident = false },
  server_error = { stage = 7, next = true, incident = true },
  malformed = { stage = 5, next = true, incident = true },
  breaker_open = { stage = 5, next = true, incident = false },
  rejected = { stage = 4, next = false, incident = false },
  not_this_service = { stage = 3, next = true, incident = true },
  token_refused = { stage = 3, next = true, incident = true },
  not_allowed = { stage = 3, next = false, incident = false },
  incompatible = { stage = 3, next = true, incident = false },
  unsupported = { stage = 3, next = true, incident = false },
  certificate = { stage = 1, next = false, incident = true },
}

local KINDS = {
  [401] = "token_refused", [403] = "not_allowed", [404] = "not_this_service", [405] = "not_this_service",
  [407] = "token_refused", [408] = "disconnected", [410] = "not_this_service", [421] = "not_this_service",
  [425] = "throttled", [426] = "incompatible", [428] = "incompatible", [429] = "throttled", [501] = "not_this_service",
  [503] = "throttled",
}

local MAYBE = { server_error = true, throttled = true, malformed = true, disconnected = true }

function faults.is_stage(value)
  return type(value) == "number" and value % 1 == 0 and value >= 0 and value <= faults.CLEAN
end

function faults.band_of(stage)
  return BANDS[math.min(3, stage // 3) + 1]
end

function faults.escalate(stage, incidents)
  return math.max(0, stage - incidents)
end

--- How an escalated fault counts towards its call: PANIC only if its kind starts there.
function faults.weight_in_call(kind, incidents)
  local stage = faults.TABLE[kind].stage
  return math.max(faults.escalate(stage, incidents), math.min(stage, 3))
end

--- The worst of a call's faults, held inside the band of its outcome.
function faults.call_stage(outcome, stages)
  local lowest, highest = table.unpack(OUTCOMES[outcome])
  return math.max(lowest, math.min(highest, faults.CLEAN, table.unpack(stages)))
end

function faults.raises(stage, tolerance)
  return stage < faults.CLEAN - tolerance
end

--- The kind of fault that an HTTP status is, or nil for success.
function faults.kind_of_status(status)
  if status == 200 then return nil end
  if KINDS[status] then return KINDS[status] end
  if status >= 400 and status < 500 then return "rejected" end
  return status >= 500 and status < 600 and "server_error" or "malformed"
end

--- Whether a bust that was answered with such a status may have been applied: not where there was no room for it.
function faults.may_be_applied(status)
  return status ~= 507 and MAYBE[faults.kind_of_status(status)] or false
end

return faults
