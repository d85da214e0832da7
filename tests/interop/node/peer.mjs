// A bustcall daemon in Node.js, with nothing but its standard library: node peer.mjs [--port N]
// It holds no cache: what it is asked to bust it checks as a daemon must, counts, tells those who follow, and
// acknowledges. --heartbeat SECONDS is of the streams of events, --kept N how many events are kept for who comes back.
import { createHash } from "node:crypto";
import { STATUS_CODES, createServer } from "node:http";
import { isIP } from "node:net";
import { parseArgs } from "node:util";
import { Log } from "./events.mjs";
import { checkVectors } from "./vectors.mjs";

const VERSION = "0.1.0";
const MAX_TARGET_BYTES = 8192;
const MAX_BODY_BYTES = 65536;
const HISTORY = 64;
const PATIENCE = 10_000; // milliseconds for a request to arrive
const MOST_READERS = 500;
const MOST_WANTED = 100; // prefixes, and again tags, that one reader can name
const STRATEGIES = ["direct", "dimensional", "hybrid"];

// [capabilities]
const CAPABILITIES = {
  binding: "node",
  version: "0.1.0",
  semverx: "0.experimental.1.experimental.0.experimental",
  capabilities: ["cache.bust", "daemon.status", "daemon.capabilities", "events.stream"],
  endpoints: {
    "cache.bust": "/api/v1/bust",
    "daemon.status": "/api/v1/status",
    "daemon.capabilities": "/api/v1/capabilities",
    "events.stream": "/api/v1/events",
  },
  supported_strategies: ["direct", "dimensional", "hybrid"],
  fault_tolerance: { max_stage: 12, default_stage: 6, p2p_fallback: false },
  requires: { semverx: "*", capabilities: [] },
  limits: { max_target_bytes: 8192, max_body_bytes: 65536 },
  access: {
    "cache.bust": "public",
    "daemon.status": "public",
    "daemon.capabilities": "public",
    "events.stream": "public",
  },
};
// [/capabilities]

const DOCUMENT = JSON.stringify(CAPABILITIES);
const DIGEST = `sha256:${createHash("sha256").update(DOCUMENT).digest("hex")}`;

/** A request ends here: the status, why, which field is at fault, and at which stage it is remembered. */
class Refusal extends Error {
  constructor(status, detail, { field, stage = 4, headers = {}, binding = "unknown" } = {}) {
    super(detail);
    Object.assign(this, { status, field, stage, headers, binding });
  }
}

// [checks]
/** Read the body of a bust; throw the refusal of one that cannot be served. */
export function readBust(body) {
  let asked;
  try {
    asked = JSON.parse(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(body));
  } catch {
    throw new Refusal(400, "the body is not JSON in UTF-8");
  }
  if (asked === null || typeof asked !== "object" || Array.isArray(asked))
    throw new Refusal(400, "the body is not a JSON object");
  const { target, strategy = "dimensional", binding = "unknown", fault_tolerance = 6 } = asked;
  const refuse = (field, why) => {
    throw new Refusal(422, `${field} ${why}`, { field, binding: isName(binding) ? binding : "unknown" });
  };
  if (typeof target !== "string") refuse("target", "must be a string");
  if (target === "") refuse("target", "is empty");
  if (/[\u0000-\u001f\u007f-\u009f]/.test(target)) refuse("target", "has a control character");
  if (/\p{Surrogate}/u.test(target)) refuse("target", "has a lone surrogate");
  if (Buffer.byteLength(target) > MAX_TARGET_BYTES) refuse("target", `has more than ${MAX_TARGET_BYTES} bytes`);
  if (!STRATEGIES.includes(strategy)) refuse("strategy", `must be one of ${STRATEGIES.join(", ")}`);
  if (!isName(binding)) refuse("binding", "must be 1 to 128 characters");
  if (!Number.isInteger(fault_tolerance) || fault_tolerance < 0 || fault_tolerance > 12)
    refuse("fault_tolerance", "must be an integer from 0 to 12");
  return { target, strategy, binding, fault_tolerance };
}

const isName = (value) => typeof value === "string" && value !== "" && [...value].length <= 128;

export const cacheKeyOf = (target) => `sha256:${createHash("sha256").update(target).digest("hex")}`;
// [/checks]

// What the daemon remembers

const history = [];
let bustsApplied = 0;
let log; // of events

function remember({ stage, message, binding }) {
  history.push({ timestamp: new Date().toISOString(), binding, fault_stage: stage, message });
  if (history.length > HISTORY) history.shift();
}

// The routes: each returns [status, headers, body], or has answered

const json = (document) => [200, { "Content-Type": "application/json" }, JSON.stringify(document)];

async function bust(request) {
  const started = performance.now();
  const { target, strategy } = readBust(await readBody(request));
  bustsApplied += 1;
  log.tell({ namespace: "default", kind: "key", target, soft: false, strategy }); // before it is answered
  return json({
    status: "success",
    cache_key: cacheKeyOf(target),
    delegate: "node-peer",
    fault_stage: 12,
    execution_time_ms: Math.floor(performance.now() - started),
  });
}

function status() {
  return json({
    daemon_pid: process.pid,
    bindings: { node: { status: "active", version: VERSION } },
    cache_size: "0B",
    fault_history: history,
    busts_applied: bustsApplied,
  });
}

// [etag]
function capabilities(request) {
  const ETag = `"${DIGEST}"`;
  const known = (request.headers["if-none-match"] ?? "").split(",").map((tag) => tag.trim().replace(/^W\//, ""));
  if (known.includes(ETag) || known.includes("*")) return [304, { ETag }, ""];
  return [200, { "Content-Type": "application/json", ETag }, DOCUMENT];
}
// [/etag]

function events(request, response) {
  const headers = { "Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no" };
  const interest = readInterest(new URL(request.url, "http://localhost").searchParams);
  if (request.method === "HEAD") return [200, headers, ""];
  if (log.readers >= MOST_READERS)
    throw new Refusal(429, `${MOST_READERS} readers follow the events already`, { headers: { "Retry-After": "5" } });
  response.writeHead(200, { ...headers, "Bustcall-Capabilities": DIGEST, Connection: "close" });
  log.follow(response, interest, request.headers["last-event-id"]);
  return null;
}

/** Read what a reader wants to be told of; throw the refusal of what cannot be. */
function readInterest(query) {
  const said = (name, most, isFine) => {
    const values = query.getAll(name);
    if (values.length > most) throw new Refusal(422, `${name} can be said ${most} times at most`, { field: name });
    if (!values.every(isFine)) throw new Refusal(422, `${name} cannot be that`, { field: name });
    return values;
  };
  const isKey = (text) => text !== "" && !/\p{Cc}/u.test(text) && Buffer.byteLength(text) <= MAX_TARGET_BYTES;
  const [namespace = "default"] = said("namespace", 1, (text) => /^[a-z0-9][\w.-]{0,63}$/i.test(text));
  return { namespace, prefixes: said("prefix", MOST_WANTED, isKey), tags: said("tag", MOST_WANTED, isKey) };
}

const ROUTES = {
  "/api/v1/bust": { POST: bust },
  "/api/v1/status": { GET: status },
  "/api/v1/capabilities": { GET: capabilities },
  "/api/v1/events": { GET: events },
};

/** Read a JSON body of a bearable size. What is beyond it passes by unkept, so that the answer finds its reader. */
async function readBody(request) {
  if ((request.headers["content-type"] ?? "").split(";")[0].trim().toLowerCase() !== "application/json")
    throw new Refusal(415, "the body must be application/json");
  const chunks = [];
  let size = 0;
  return new Promise((resolve, reject) => {
    request.on("data", (chunk) => {
      size += chunk.length;
      if (size <= MAX_BODY_BYTES) chunks.push(chunk);
    });
    request.on("end", () => {
      if (size <= MAX_BODY_BYTES) resolve(Buffer.concat(chunks));
      else reject(new Refusal(413, `the body is larger than ${MAX_BODY_BYTES} bytes`));
    });
    request.on("error", () => reject(new Refusal(400, "the body is not what its headers announce")));
  });
}

/** Refuse who comes by another name (DNS rebinding) or from a web page. */
function admit({ headers: { host = "", origin } }) {
  const name = host.replace(/:\d+$/, "").replace(/^\[(.*)\]$/, "$1").toLowerCase();
  if (name !== "localhost" && !isIP(name))
    throw new Refusal(421, "this daemon does not answer for that host", { stage: 3 });
  if (origin !== undefined) throw new Refusal(403, "web pages may not call this daemon", { stage: 3 });
}

async function answer(request, response) {
  admit(request);
  const methods = ROUTES[request.url.split("?")[0]];
  if (methods === undefined) throw new Refusal(404, "there is no such route", { stage: 3 });
  const handler = methods[request.method === "HEAD" ? "GET" : request.method];
  if (handler === undefined) {
    const headers = { Allow: Object.keys(methods).join(", ") };
    throw new Refusal(405, "this route does not take this method", { stage: 3, headers });
  }
  return handler(request, response);
}

// [errors]
/** Say a refusal as an RFC 9457 problem. */
function problem({ status, message, field, headers }) {
  const document = { type: "about:blank", title: STATUS_CODES[status], status, detail: message, field };
  return [status, { "Content-Type": "application/problem+json", ...headers }, JSON.stringify(document)];
}
// [/errors]

async function serve(request, response) {
  const answered = await answer(request, response).catch((error) => {
    const refusal = error instanceof Refusal ? error : new Refusal(500, "the daemon failed", { stage: 7 });
    remember(refusal);
    return problem(refusal);
  });
  request.resume(); // a body that nobody wanted
  if (answered === null) return;
  const [status, headers, body] = answered;
  const length = status === 304 ? {} : { "Content-Length": Buffer.byteLength(body) };
  response.writeHead(status, { ...headers, ...length, "Bustcall-Capabilities": DIGEST }).end(body);
}

/** Answer what is no HTTP, came too late or has too large a head, and hang up. */
function refuseUnread(error, socket) {
  if (!socket.writable) return;
  const status = { HPE_HEADER_OVERFLOW: 431, ERR_HTTP_REQUEST_TIMEOUT: 408 }[error.code] ?? 400;
  const refusal = new Refusal(status, "the request is not HTTP as this daemon reads it");
  remember(refusal);
  const [, headers, body] = problem(refusal);
  const fields = Object.entries({ ...headers, "Content-Length": Buffer.byteLength(body), Connection: "close" });
  const head = [`HTTP/1.1 ${status} ${STATUS_CODES[status]}`, ...fields.map((pair) => pair.join(": "))];
  socket.end(`${head.join("\r\n")}\r\n\r\n${body}`);
}

function listen({ port, heartbeat, kept }) {
  log = new Log({ kept: Number(kept), heartbeat: Number(heartbeat) });
  const options = { headersTimeout: PATIENCE, requestTimeout: PATIENCE, connectionsCheckingInterval: 1000 };
  const server = createServer(options, serve).on("clientError", refuseUnread);
  server.maxConnections = 1000;
  server.on("error", (error) => {
    console.error(`cannot listen on port ${port}: ${error.message}`);
    process.exit(4);
  });
  server.listen(Number(port), "127.0.0.1", () => console.log(`listening on http://127.0.0.1:${server.address().port}`));
  process.once("SIGTERM", () => {
    log.close();
    server.close(() => process.exit(0)); // requests under way are finished
    server.closeIdleConnections();
    setTimeout(() => process.exit(0), PATIENCE).unref();
  });
}

const { values } = parseArgs({
  options: {
    port: { type: "string", default: "8083" },
    heartbeat: { type: "string", default: "5" },
    kept: { type: "string", default: "1000" },
    "check-vectors": { type: "string" },
  },
});
if (values["check-vectors"] === undefined) listen(values);
else process.exitCode = (await checkVectors(values["check-vectors"], { readBust, cacheKeyOf })) ? 0 : 1;
