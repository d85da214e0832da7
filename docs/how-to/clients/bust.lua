-- Busts the targets given as arguments at a bustcall daemon: lua5.4 bust.lua cdn/main.css products/7.html
-- BUSTCALL_URL says where it listens (http only); BUSTCALL_TOKEN, if set, is sent: not over a network, please.
-- Needs LuaSocket and lua-cjson (Debian: lua-socket lua-cjson), and sha256.lua beside it.
local cjson, http, ltn12 = require "cjson.safe", require "socket.http", require "ltn12"
local sha256 = dofile((arg[0]:match "^(.*/)" or "./") .. "sha256.lua")
local url = (os.getenv "BUSTCALL_URL" or "http://127.0.0.1:8989"):gsub("/+$", "") .. "/api/v1/bust"
local token = os.getenv "BUSTCALL_TOKEN"
http.TIMEOUT = 5

--- Send one bust; return what went wrong, or nil, and whether nobody answered.
local function send(target, key)
  local body, chunks = cjson.encode { target = target, binding = "lua" }, {}
  local answered, status = http.request {
    url = url, method = "POST", redirect = false, source = ltn12.source.string(body), sink = ltn12.sink.table(chunks),
    headers = {
      ["Content-Type"] = "application/json", ["Content-Length"] = #body, ["Idempotency-Key"] = key,
      ["Bustcall-Binding"] = "lua", ["Authorization"] = token and "Bearer " .. token or nil,
    },
  }
  if not answered then return tostring(status), true end
  local said = table.concat(chunks)
  if status ~= 200 then return ("HTTP %s: %s"):format(status, said:sub(1, 300)) end
  local reply = cjson.decode(said)
  local done = type(reply) == "table" and (reply.status == "success" or reply.success == true)
  if not done then return "its answer does not say that it succeeded" end
  if reply.cache_key ~= "sha256:" .. sha256(target) then return "its answer is for another target" end
end

for _, target in ipairs(arg) do
  local bytes = io.open("/dev/urandom", "rb"):read(16)
  local key = bytes:gsub(".", function(byte) return ("%02x"):format(byte:byte()) end)
  local wrong, unanswered = send(target, key)
  if unanswered then wrong = send(target, key) end -- with the same key, so it does no harm
  print(wrong and ("failed %s: %s"):format(target, wrong) or "busted " .. target)
  if wrong then arg.failed = true end
end
os.exit(not arg.failed)
