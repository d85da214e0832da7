-- Reads replies as a client must, strictly: what the test vectors say of them.
local cjson, sha256 = require "cjson.safe", require "sha256"
cjson.decode_invalid_numbers(false)

local MOST = 1024 * 1024 -- bytes of a reply

local function whole(value, most)
  return value == nil or (type(value) == "number" and value >= 0 and value <= most and value % 1 == 0)
end

--- Tell why the body of a 200 answer does not acknowledge the bust of `target`, or nil if it does.
local function doubt(target, body)
  local reply = #body <= MOST and utf8.len(body) and cjson.decode(body)
  if type(reply) ~= "table" then return "its answer is not JSON, or too large" end
  for name, value in pairs(reply) do
    if value == cjson.null then reply[name] = nil end
  end
  local status, success, key = reply.status, reply.success, reply.cache_key
  local failed = (status ~= nil and status ~= "success") or (success ~= nil and success ~= true)
  if failed or (status == nil and success == nil) then return "its answer does not say that it succeeded" end
  local sound = whole(reply.fault_stage, 255) and whole(reply.execution_time_ms, math.huge)
    and whole(reply.removed, math.huge) and (reply.delegate == nil or type(reply.delegate) == "string")
  if type(key) ~= "string" or key == "" or not sound then return "its answer is not what the protocol says" end
  if key:find("^sha256:") and key ~= "sha256:" .. sha256(target) then return "its answer is for another target" end
end

return { doubt = doubt }
