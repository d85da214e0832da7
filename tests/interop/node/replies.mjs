// Reads replies as a client must, strictly: what the test vectors say of them.
import { createHash } from "node:crypto";

const whole = (value, most) => value == null || (Number.isInteger(value) && value >= 0 && value <= most);

/** Tell why the body of a 200 answer does not acknowledge the bust of `target`, or null if it does. */
export function doubt(target, body) {
  let reply;
  try {
    reply = JSON.parse(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(body)) ?? {};
  } catch {
    return "its answer is not JSON";
  }
  const { status, success, cache_key: key, delegate } = reply;
  if ((status ?? success) == null || (status ?? "success") !== "success" || (success ?? true) !== true)
    return "its answer does not say that it succeeded";
  const counts = [reply.execution_time_ms, reply.removed];
  const sound = whole(reply.fault_stage, 255) && counts.every((count) => whole(count, Infinity));
  if (typeof key !== "string" || !key || !sound || typeof (delegate ?? "") !== "string")
    return "its answer is not what the protocol says";
  const right = `sha256:${createHash("sha256").update(target).digest("hex")}`;
  return key.startsWith("sha256:") && key !== right ? "its answer is for another target" : null;
}
