// Busts the targets given as arguments at a bustcall daemon: node bust.mjs cdn/main.css products/7.html
// BUSTCALL_URL says where it listens; BUSTCALL_TOKEN, if set, is sent: over a network only with an https URL, please.
import { createHash, randomUUID } from "node:crypto";

const { BUSTCALL_URL = "http://127.0.0.1:8989", BUSTCALL_TOKEN } = process.env;

/** Send one bust; tell what went wrong, or null. */
async function send(target, key) {
  const headers = { "Content-Type": "application/json", "Idempotency-Key": key, "Bustcall-Binding": "node" };
  if (BUSTCALL_TOKEN) headers.Authorization = `Bearer ${BUSTCALL_TOKEN}`;
  const body = JSON.stringify({ target, binding: "node" });
  const url = `${BUSTCALL_URL.replace(/\/+$/, "")}/api/v1/bust`;
  const signal = AbortSignal.timeout(5000);
  const response = await fetch(url, { method: "POST", headers, body, redirect: "manual", signal });
  const said = await response.text();
  if (response.status !== 200) return `HTTP ${response.status}: ${said.slice(0, 300)}`;
  const reply = said.startsWith("{") ? JSON.parse(said) : {};
  if (reply.status !== "success" && reply.success !== true) return "its answer does not say that it succeeded";
  const right = `sha256:${createHash("sha256").update(target).digest("hex")}`;
  return reply.cache_key === right ? null : "its answer is for another target";
}

for (const target of process.argv.slice(2)) {
  const key = randomUUID(); // the same on the second try, which then does no harm
  const failed = (error) => error.cause?.message ?? error.message;
  const wrong = await send(target, key).catch(() => send(target, key)).catch(failed);
  console.log(wrong === null ? `busted ${target}` : `failed ${target}: ${wrong}`);
  if (wrong !== null) process.exitCode = 1;
}
