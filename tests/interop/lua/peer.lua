-- A bustcall daemon in Lua 5.4 with LuaSocket and lua-cjson: lua5.4 peer.lua [--port N] [--patience SECONDS]
-- It holds no cache: what it is asked to bust it checks as a daemon must, counts, and acknowledges.
--
-- One thread serves all connections. `select` tells which can be read or written without waiting; each connection keeps
-- what has arrived and what is still to be sent, so that one that is slow, or silent, keeps nobody waiting.
local here = arg[0]:match "^(.*/)" or "./"
package.path = here .. "?.lua;" .. here .. "../../../docs/how-to/clients/?.lua;" .. package.path

local cjson, socket, sha256 = require "cjson.safe", require "socket", require "sha256"
cjson.decode_invalid_numbers(false)

local MAX_TARGET_BYTES <const> = 8192
local MAX_BODY_BYTES <const> = 65536
local MAX_HEAD_BYTES <const> = 16384
local MAX_CONNECTIONS <const> = 256
local HISTORY <const> = 64
local LINGER <const> = 1.0 -- seconds in which what still comes is read and dropped, so that the last answer arrives
local STRATEGIES = { direct = true, dimensional = true, hybrid = true }

-- [capabilities]
local CAPABILITIES = [[{
  "binding": "lua",
  "version": "0.1.0",
  "semverx": "0.experimental.1.experimental.0.experimental",
  "capabilities": ["cache.bust", "daemon.status", "daemon.capabilities"],
  "endpoints": {
    "cache.bust": "/api/v1/bust",
    "daemon.status": "/api/v1/status",
    "daemon.capabilities": "/api/v1/capabilities"
  },
  "supported_strategies": ["direct", "dimensional", "hybrid"],
  "fault_tolerance": {"max_stage": 12, "default_stage": 6, "p2p_fallback": false},
  "requires": {"semverx": "*", "capabilities": []},
  "limits": {"max_target_bytes": 8192, "max_body_bytes": 65536},
  "access": {"cache.bust": "public", "daemon.status": "public", "daemon.capabilities": "public"}
}]]
-- [/capabilities]
local DIGEST = "sha256:" .. sha256(CAPABILITIES)

local patience -- seconds in which a request must arrive, or an answer be taken
local pid = 0 -- Lua does not know it; Linux does
local stat = io.open "/proc/self/stat"
if stat then
  pid = stat:read "n"
  stat:close()
end

local function refusal(status, detail, more)
  more = more or {}
  return {
    status = status, detail = detail, field = more.field, stage = more.stage or 4,
    headers = more.headers or {}, binding = more.binding or "unknown",
  }
end

-- [checks]
local function is_name(value)
  return type(value) == "string" and value ~= "" and utf8.len(value) <= 128
end

--- Read the body of a bust; return nil and the refusal of one that cannot be served.
local function read_bust(body)
  local asked = utf8.len(body) and cjson.decode(body)
  if type(asked) ~= "table" or not body:find "^%s*{" then
    return nil, refusal(400, "the body is not a JSON object in UTF-8")
  end
  local function refuse(field, why)
    local binding = is_name(asked.binding) and asked.binding or "unknown"
    return nil, refusal(422, field .. " " .. why, { field = field, binding = binding })
  end
  local target, strategy, binding, tolerance = asked.target, asked.strategy, asked.binding, asked.fault_tolerance
  if strategy == nil then strategy = "dimensional" end
  if binding == nil then binding = "unknown" end
  if tolerance == nil then tolerance = 6 end
  if type(target) ~= "string" then return refuse("target", "must be a string") end
  if target == "" then return refuse("target", "is empty") end
  if target:find "[\0-\x1f\x7f]" or target:find "\xc2[\x80-\x9f]" then -- C0 and DEL; C1 as UTF-8 has it
    return refuse("target", "has a control character")
  end
  if #target > MAX_TARGET_BYTES then return refuse("target", "has more than 8192 bytes") end
  if not STRATEGIES[strategy] then return refuse("strategy", "must be direct, dimensional or hybrid") end
  if not is_name(binding) then return refuse("binding", "must be 1 to 128 characters") end
  if type(tolerance) ~= "number" or tolerance % 1 ~= 0 or tolerance < 0 or tolerance > 12 then
    return refuse("fault_tolerance", "must be an integer from 0 to 12")
  end
  return { target = target, strategy = strategy, binding = binding, fault_tolerance = tolerance }
end

local function cache_key_of(target)
  return "sha256:" .. sha256(target)
end
-- [/checks]

-- What the daemon remembers

local history, busts_applied = {}, 0

local function remember(refused)
  history[#history + 1] = cjson.encode {
    timestamp = os.date "!%Y-%m-%dT%H:%M:%SZ", binding = refused.binding,
    fault_stage = refused.stage, message = refused.detail,
  }
  if #history > HISTORY then table.remove(history, 1) end
end

-- The routes: each returns the status, the headers and the body, or nil and the refusal

local JSON = { ["Content-Type"] = "application/json" }

local function bust(request)
  local kind = (request.headers["content-type"] or ""):match "^[^;%s]*":lower()
  if kind ~= "application/json" then return nil, refusal(415, "the body must be application/json") end
  local started = socket.gettime()
  local asked, refused = read_bust(request.body)
  if not asked then return nil, refused end
  busts_applied = busts_applied + 1
  return 200, JSON, cjson.encode {
    success = true, cache_key = cache_key_of(asked.target), delegate = "lua-peer", fault_stage = 12,
    execution_time_ms = math.max(0, math.floor((socket.gettime() - started) * 1000)),
  }
end

local function status()
  local told = {
    daemon_pid = pid, bindings = { lua = { status = "active", version = "0.1.0" } },
    cache_size = "0B", busts_applied = busts_applied,
  }
  -- lua-cjson cannot tell an empty list from an empty object, so the list is put together here
  local list = "[" .. table.concat(history, ",") .. "]"
  return 200, JSON, '{"fault_history":' .. list .. "," .. cjson.encode(told):sub(2)
end

-- [etag]
local function capabilities(request)
  local etag = '"' .. DIGEST .. '"'
  for tag in (request.headers["if-none-match"] or ""):gmatch "[^%s,]+" do
    if tag == "*" or tag:gsub("^W/", "") == etag then return 304, { ETag = etag }, "" end
  end
  return 200, { ["Content-Type"] = "application/json", ETag = etag }, CAPABILITIES
end
-- [/etag]

local ROUTES = {
  ["/api/v1/bust"] = { POST = bust },
  ["/api/v1/status"] = { GET = status },
  ["/api/v1/capabilities"] = { GET = capabilities },
}

--- Refuse who comes by another name (DNS rebinding) or from a web page.
local function admit(headers)
  local name = (headers.host or ""):gsub(":%d+$", ""):lower()
  local address = name:find "^%d+%.%d+%.%d+%.%d+$" or name:find "^%[[%x:.]+%]$"
  if name ~= "localhost" and not address then
    return refusal(421, "this daemon does not answer for that host", { stage = 3 })
  end
  if headers.origin then return refusal(403, "web pages may not call this daemon", { stage = 3 }) end
end

local function answer(request)
  local refused = admit(request.headers)
  if refused then return nil, refused end
  local methods = ROUTES[request.target:match "^[^?]*"]
  if not methods then return nil, refusal(404, "there is no such route", { stage = 3 }) end
  local handler = methods[request.method == "HEAD" and "GET" or request.method]
  if not handler then
    local more = { stage = 3, headers = { Allow = next(methods) } }
    return nil, refusal(405, "this route does not take this method", more)
  end
  return handler(request)
end

-- HTTP: from bytes to a request, from an answer to bytes

local PHRASES = {
  [200] = "OK", [304] = "Not Modified", [400] = "Bad Request", [403] = "Forbidden", [404] = "Not Found",
  [405] = "Method Not Allowed", [408] = "Request Timeout", [411] = "Length Required", [413] = "Content Too Large",
  [415] = "Unsupported Media Type", [421] = "Misdirected Request", [422] = "Unprocessable Content",
  [431] = "Request Header Fields Too Large", [500] = "Internal Server Error",
}

--- Read the head of a request; return nil and the refusal of one that is none.
local function read_head(head)
  local malformed = refusal(400, "the request is not HTTP as this daemon reads it")
  local line, rest = head:match "^([^\r\n]*)\r\n(.*)$"
  local method, target, version = (line or ""):match "^(%u+) (/[!-~]*) HTTP/1%.([01])$"
  if not method or head:gsub("\r\n", ""):find "[\r\n\0]" then return nil, malformed end
  local headers = {}
  for field in rest:gmatch "([^\r\n]*)\r\n" do
    local name, value = field:match "^([%w!#$%%&'*+.^_`|~-]+):[ \t]*(.-)[ \t]*$"
    if not name then return nil, malformed end
    name = name:lower()
    if headers[name] and (name == "content-length" or name == "host") then return nil, malformed end
    headers[name] = headers[name] and headers[name] .. ", " .. value or value
  end
  if headers["transfer-encoding"] then return nil, refusal(411, "say the length of the body with Content-Length") end
  local length = headers["content-length"] or "0"
  if not length:find "^%d+$" then return nil, malformed end
  if #length > 9 or tonumber(length) > MAX_BODY_BYTES then
    return nil, refusal(413, ("the body is larger than %d bytes"):format(MAX_BODY_BYTES))
  end
  local connection = (headers.connection or ""):lower()
  local close = connection:find "close" or (version == "0" and not connection:find "keep%-alive") or false
  return { method = method, target = target, headers = headers, length = tonumber(length), close = close }
end

local function write_answer(status, headers, body, request)
  local lines = { ("HTTP/1.1 %d %s"):format(status, PHRASES[status]) }
  for name, value in pairs(headers) do lines[#lines + 1] = name .. ": " .. value end
  lines[#lines + 1] = "Bustcall-Capabilities: " .. DIGEST
  lines[#lines + 1] = os.date "!Date: %a, %d %b %Y %H:%M:%S GMT"
  if status ~= 304 then lines[#lines + 1] = "Content-Length: " .. #body end
  if request.close then lines[#lines + 1] = "Connection: close" end
  return table.concat(lines, "\r\n") .. "\r\n\r\n" .. (request.method == "HEAD" and "" or body)
end

-- [errors]
--- Say a refusal in one line of plain text.
local function write_refusal(refused, request)
  local headers = { ["Content-Type"] = "text/plain; charset=utf-8" }
  for name, value in pairs(refused.headers) do headers[name] = value end
  return write_answer(refused.status, headers, refused.detail .. "\n", request)
end
-- [/errors]

-- Connections: `inbox` is what has arrived, `outbox` what is still to be sent, `since` when the current wait began

local function refuse_and_close(connection, refused)
  remember(refused)
  connection.outbox = connection.outbox .. write_refusal(refused, { close = true })
  connection.closing, connection.inbox = true, ""
end

--- Answer one whole request out of the inbox; tell whether there was one.
local function answer_next(connection)
  local request = connection.request
  if not request then
    local _, last = connection.inbox:find("\r\n\r\n", 1, true)
    if not last or last > MAX_HEAD_BYTES then
      if #connection.inbox > MAX_HEAD_BYTES then
        refuse_and_close(connection, refusal(431, "the head of the request is too large"))
      end
      return false
    end
    local refused
    request, refused = read_head(connection.inbox:sub(1, last - 2))
    if not request then
      refuse_and_close(connection, refused)
      return false
    end
    connection.request, connection.inbox = request, connection.inbox:sub(last + 1)
    if #connection.inbox < request.length and (request.headers.expect or ""):lower() == "100-continue" then
      connection.outbox = connection.outbox .. "HTTP/1.1 100 Continue\r\n\r\n"
    end
  end
  if #connection.inbox < request.length then return false end
  request.body = connection.inbox:sub(1, request.length)
  connection.request, connection.inbox = nil, connection.inbox:sub(request.length + 1)
  local ok, status, headers, body = pcall(answer, request)
  if ok and status then
    connection.outbox = connection.outbox .. write_answer(status, headers, body, request)
  else
    local refused = ok and headers or refusal(500, "the daemon failed", { stage = 7 })
    remember(refused)
    connection.outbox = connection.outbox .. write_refusal(refused, request)
  end
  connection.closing = request.close
  connection.since = socket.gettime()
  return not connection.closing
end

local connections, count = {}, 0

local function drop(connection)
  connection.socket:close()
  connections[connection.socket] = nil
  count = count - 1
end

--- Send what can be sent without waiting; when all is out, hang up or take up the next request.
local function send(connection)
  local sent, problem, last = connection.socket:send(connection.outbox)
  local upto = sent or last or 0
  if not sent and problem ~= "timeout" then return drop(connection) end
  if upto > 0 then connection.since = socket.gettime() end
  connection.outbox = connection.outbox:sub(upto + 1)
  if connection.outbox ~= "" then return end
  if connection.closing then
    connection.socket:shutdown "send"
    connection.lingering = true
  end
end

--- Read what has arrived; it is answered one request at a time, and nothing more is read until an answer is out.
local function receive(connection)
  local data, problem, partial = connection.socket:receive(8192)
  data = data or partial
  if connection.lingering then data = "" end
  if #data > 0 and connection.inbox == "" and not connection.request then connection.since = socket.gettime() end
  connection.inbox = connection.inbox .. data
  connection.ended = problem == "closed" -- they send nothing more, and may still wait for answers
end

--- Answer what can be answered; drop whom nothing is owed and nothing will come from.
local function advance(connection)
  while connections[connection.socket] and connection.outbox == "" and not connection.closing do
    local answered = answer_next(connection)
    if connection.outbox ~= "" then send(connection) end
    if not answered then break end
  end
  if connections[connection.socket] and connection.ended and connection.outbox == "" then drop(connection) end
end

--- Hang up on whoever takes too long, or has nothing to say.
local function expire(connection, now)
  local waited = now - connection.since
  if connection.lingering then
    if waited > LINGER then drop(connection) end
  elseif waited > patience then
    local begun = connection.request or connection.inbox ~= ""
    if connection.outbox ~= "" or connection.closing or not begun then return drop(connection) end
    refuse_and_close(connection, refusal(408, "the request did not arrive in time"))
    connection.since = now
    send(connection)
  end
end

--- Do one thing for a connection. An error in it ends that connection, and is told; the others are served on.
local function attend(connection, act, ...)
  local ok, problem = pcall(act, connection, ...)
  if ok then return end
  io.stderr:write(("a connection was closed after an error: %s\n"):format(problem))
  if connections[connection.socket] then drop(connection) end
end

local function serve(port)
  local server, problem = socket.bind("127.0.0.1", port, 128)
  if not server then
    io.stderr:write(("cannot listen on port %d: %s\n"):format(port, problem))
    os.exit(4)
  end
  server:settimeout(0)
  print(("listening on http://127.0.0.1:%d"):format(select(2, server:getsockname())))
  io.stdout:flush()
  while true do
    local readers, writers = { server }, {}
    for _, connection in pairs(connections) do
      local list = connection.outbox == "" and readers or writers
      list[#list + 1] = connection.socket
    end
    local readable, writable = socket.select(readers, writers, math.min(0.5, patience / 4))
    for _, ready in ipairs(readable) do
      local connection = connections[ready]
      if ready == server then
        local accepted = server:accept()
        if accepted and count >= MAX_CONNECTIONS then
          accepted:close()
        elseif accepted then
          accepted:settimeout(0)
          accepted:setoption("tcp-nodelay", true)
          connections[accepted] = { socket = accepted, inbox = "", outbox = "", since = socket.gettime() }
          count = count + 1
        end
      elseif connection then
        attend(connection, receive)
        attend(connection, advance)
      end
    end
    for _, ready in ipairs(writable) do
      local connection = connections[ready]
      if connection then
        attend(connection, send)
        attend(connection, advance)
      end
    end
    local now = socket.gettime()
    for _, connection in pairs(connections) do attend(connection, expire, now) end
  end
end

local function usage()
  io.stderr:write "usage: lua5.4 peer.lua [--port N] [--patience SECONDS] [--check-vectors DIR]\n"
  os.exit(2)
end

local options = { ["--port"] = "8082", ["--patience"] = "10" }
for index = 1, #arg, 2 do
  local known = ({ ["--port"] = true, ["--patience"] = true, ["--check-vectors"] = true })[arg[index]]
  if not known or not arg[index + 1] then usage() end
  options[arg[index]] = arg[index + 1]
end
patience = tonumber(options["--patience"]) or usage()
if options["--check-vectors"] then
  os.exit(require "vectors"(options["--check-vectors"], { read_bust = read_bust, cache_key_of = cache_key_of }))
end
local port = math.tointeger(tonumber(options["--port"])) or usage()
serve(port)
