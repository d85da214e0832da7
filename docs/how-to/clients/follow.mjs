// Follows what a bustcall daemon busts, and prints a line for each event: node follow.mjs products/ pages/
// Each argument is a prefix; without any it is told of all. BUSTCALL_URL and BUSTCALL_TOKEN are as of bust.mjs, and
// BUSTCALL_NAMESPACE says whose events. To keep a cache right, copy it, and use `follow` and `drops`.
import { realpathSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";

const MOST_BYTES = 2 * 1024 * 1024; // of one event
const BEATS = 3; // heartbeats without a sign of life after which a connection is lost
const PAUSES = [0.1, 5]; // seconds: the first and the longest before the daemon is asked again

/** Reads server-sent events from bytes, in whatever pieces they come. What is no UTF-8 is an error. */
export class StreamParser {
  #pieces = []; // of a line that has not ended
  #size = 0; // of that line, and of the event so far
  #afterReturn = false; // a line feed now belongs to the line that has ended
  #isFirst = true;
  #event = "";
  #data = [];
  #id = "";

  /** Take in what came; yield the blocks that are complete by that. One without data says only how far it is. */
  *feed(bytes) {
    let begin = 0;
    for (let at = 0; at < bytes.length; at += 1) {
      const [isReturn, isFeed] = [bytes[at] === 13, bytes[at] === 10];
      const isRest = isFeed && this.#afterReturn;
      this.#afterReturn = isReturn;
      if (isReturn || isFeed) {
        if (!isRest) {
          const block = this.#endLine(this.#take(bytes.subarray(begin, at)));
          if (block) yield block;
        }
        begin = at + 1;
      }
    }
    this.#keep(bytes.subarray(begin));
  }

  #keep(bytes) {
    this.#size += bytes.length;
    if (this.#size > MOST_BYTES) throw new Error(`an event has more than ${MOST_BYTES} bytes`);
    if (bytes.length) this.#pieces.push(Buffer.from(bytes));
  }

  #take(bytes) {
    this.#keep(bytes);
    let line = Buffer.concat(this.#pieces.splice(0));
    if (this.#isFirst && line.subarray(0, 3).equals(Buffer.from([0xef, 0xbb, 0xbf]))) line = line.subarray(3);
    this.#isFirst = false;
    return line;
  }

  #endLine(line) {
    if (!line.length) {
      const block = { event: this.#event || "message", data: this.#data.join("\n"), id: this.#id };
      if (!this.#data.length) block.data = null;
      [this.#event, this.#data, this.#size] = ["", [], 0];
      return block;
    }
    if (line[0] === 58) return null; // a comment
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(line);
    const [, field, value = ""] = /^([^:]*)(?:: ?([^]*))?$/.exec(text);
    if (field === "event") this.#event = value;
    else if (field === "data") this.#data.push(value);
    else if (field === "id" && !value.includes("\0")) this.#id = value;
    return null;
  }
}

const SEPARATORS = "/:?#";
const covers = (prefix, key) =>
  key.startsWith(prefix) &&
  (key.length === prefix.length || SEPARATORS.includes(prefix.at(-1)) || SEPARATORS.includes(key[prefix.length]));
const isVariant = (key, other) =>
  other.startsWith(key) && /^(?=[^])(?:\.(?:br|deflate|gz|zst))?(?:\?[^]*)?$/.test(other.slice(key.length));

/** Tell whether the entry of a cache under `key`, with these tags, is old after a bust. */
export function drops({ kind, target, strategy, also = [] }, key, tags = []) {
  if (kind === "all" || (kind === "tag" && tags.includes(target))) return true;
  if (kind === "prefix" && covers(target, key)) return true;
  const names = kind === "tag" ? also : [target, ...also];
  return names.some((name) => key === name || (strategy !== "direct" && isVariant(name, key)));
}

/** Tell the epoch and the number of an id. */
function placeOf(id) {
  const [, epoch, number] = /^([!-~]{1,200})-(\d{1,19})$/.exec(id) ?? [];
  if (epoch === undefined) throw new Error("an event has no id of the form EPOCH-NUMBER");
  return { id, epoch, number: BigInt(number) };
}

/**
 * Follow a daemon until `signal` is aborted, over as many connections as it takes. Yields one of these at a time:
 * `{ name: "bust", ... }`: this is old; `{ name: "reset" }`: something may have been missed, forget everything;
 * `{ name: "live" }`: all that was missed has been told; `{ name: "lost" }`: until it is live again, nobody knows what is
 * busted. What is kept before it is live for the first time may be old. Throws if the daemon says that it will not tell.
 */
export async function* follow(url, { namespace, prefixes = [], tags = [], token, signal } = {}) {
  const asked = [["namespace", namespace], ...prefixes.map((it) => ["prefix", it]), ...tags.map((it) => ["tag", it])];
  const query = new URLSearchParams(asked.filter(([, value]) => value !== undefined));
  const state = { place: null, owesReset: false, heartbeat: 5, isLive: false };
  for (let failures = 0; !signal?.aborted; failures += 1) {
    const ending = new AbortController();
    const stop = () => ending.abort();
    signal?.addEventListener("abort", stop);
    try {
      const response = await inTime(state, stop, () => open(url, query, token, state, ending.signal));
      const reader = response.body.getReader();
      const parser = new StreamParser();
      for (;;) {
        const { done, value } = await inTime(state, stop, () => reader.read());
        if (done) break;
        for (const told of read(state, parser, value)) {
          if (told.name === "live") [failures, state.isLive] = [0, true];
          yield told;
        }
      }
    } catch (error) {
      if (error.isRefusal) throw error; // of all others it is asked again
    } finally {
      ending.abort();
      signal?.removeEventListener("abort", stop);
    }
    if (state.isLive) yield { name: "lost" };
    state.isLive = false;
    const pause = Math.min(PAUSES[1], PAUSES[0] * 2 ** failures) * Math.random();
    await sleep(pause * 1000, undefined, { signal }).catch(() => {});
  }
}

/** Open a stream, from the place up to which it was read. */
async function open(url, query, token, { place }, signal) {
  const headers = { Accept: "text/event-stream" };
  if (token) headers.Authorization = `Bearer ${token}`;
  if (place) headers["Last-Event-ID"] = place.id;
  const route = `${url.replace(/\/+$/, "")}/api/v1/events?${query}`;
  const response = await fetch(route, { headers, redirect: "manual", signal });
  if (response.status === 200) return response;
  const isRefusal = [400, 401, 403, 404, 405, 422, 501].includes(response.status);
  const said = (await response.text()).slice(0, 300);
  throw Object.assign(new Error(`HTTP ${response.status}: ${said}`), { isRefusal });
}

/** Do something that ends the connection if it takes three heartbeats. */
async function inTime({ heartbeat }, stop, act) {
  const timer = setTimeout(stop, BEATS * heartbeat * 1000);
  try {
    return await act();
  } finally {
    clearTimeout(timer);
  }
}

/** Tell what came. From where that is no stream of events nobody knows what was missed, so that a reset is due. */
function* read(state, parser, bytes) {
  try {
    for (const block of parser.feed(bytes)) yield* take(state, block);
  } catch (error) {
    [state.place, state.owesReset] = [null, true];
    throw error;
  }
}

/** Tell what a block means, and note how far the log was read by it. */
function* take(state, { event, data, id }) {
  const name = data !== null && ["bust", "reset", "live"].includes(event) ? event : null;
  if (name === null && !id) return; // a comment, or an event of a later version
  const [before, place] = [state.place, placeOf(id)];
  state.place = place;
  if (name === "reset") state.owesReset = false;
  const isOdd = before !== null && (before.epoch !== place.epoch || before.number > place.number);
  if (name === "reset" || isOdd) yield { name: "reset", id };
  if (name === "bust") yield { ...JSON.parse(data), name, id };
  if (name !== "live") return;
  const { heartbeat } = JSON.parse(data);
  if (!(heartbeat > 0 && heartbeat <= 3600)) throw new Error("it does not say its heartbeat");
  if (state.owesReset) yield { name: "reset", id };
  Object.assign(state, { heartbeat, owesReset: false });
  yield { name, id };
}

async function main() {
  const { BUSTCALL_URL = "http://127.0.0.1:8989", BUSTCALL_TOKEN: token, BUSTCALL_NAMESPACE: namespace } = process.env;
  const ending = new AbortController();
  process.once("SIGTERM", () => ending.abort());
  const wanted = { namespace, token, prefixes: process.argv.slice(2), signal: ending.signal };
  for await (const told of follow(BUSTCALL_URL, wanted))
    console.log(told.name === "bust" ? `bust ${told.kind} ${told.target}` : told.name);
}

if (process.argv[1] && import.meta.url === pathToFileURL(realpathSync(process.argv[1])).href)
  await main().catch((error) => {
    console.log(`failed: ${error.message}`);
    process.exitCode = 1;
  });
