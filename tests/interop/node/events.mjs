// Who is told of which bust: a log of the newest events in memory, and the readers that follow it.
import { randomBytes } from "node:crypto";

const SEPARATORS = "/:?#";
const VARIANTS = ["?", ".br", ".deflate", ".gz", ".zst"]; // what a variant of a key goes on with
const MOST_WAITING = 1024 * 1024; // bytes that a reader may leave unread before it is cut off

const covers = (prefix, key) =>
  key.startsWith(prefix) &&
  (key.length === prefix.length || SEPARATORS.includes(prefix.at(-1)) || SEPARATORS.includes(key[prefix.length]));

/** Tell whether what was busted could be something that a reader holds who wants just this. */
export function concerns({ namespace, kind, target, strategy, also = [] }, { namespace: own, prefixes, tags }) {
  if (namespace !== own) return false;
  if (!prefixes.length && !tags.length) return true;
  if (kind === "all" || (kind === "tag" && tags.includes(target))) return true;
  const named = kind === "tag" ? also : [target, ...also];
  const reaches = (prefix, key) =>
    covers(prefix, key) || (strategy !== "direct" && VARIANTS.some((rest) => prefix.startsWith(key + rest)));
  return prefixes.some(
    (prefix) => named.some((key) => reaches(prefix, key)) || (kind === "prefix" && covers(target, prefix)),
  );
}

const block = (event, id, data) => `id: ${id}\nevent: ${event}\ndata: ${JSON.stringify(data)}\n\n`;

/** Put into the last of these when it was written, by a clock that is never set: all that was busted by then is told. */
const dated = (text) => `${text.slice(0, -1)}at: ${(performance.now() / 1000).toFixed(3)}\n\n`;

/** The events of one process. `kept`: how many are kept for readers that come back; `heartbeat`: in seconds. */
export class Log {
  #epoch = randomBytes(8).toString("hex");
  #number = 0;
  #events = []; // the newest, each with its number
  #readers = new Set();
  #isClosed = false;

  constructor({ kept, heartbeat }) {
    Object.assign(this, { kept, heartbeat });
  }

  /** How many follow now. */
  get readers() {
    return this.#readers.size;
  }

  get #place() {
    return `${this.#epoch}-${this.#number}`;
  }

  /** Give an event its number, keep it, and tell those whom it concerns. */
  tell(event) {
    this.#number += 1;
    const text = block("bust", this.#place, event);
    this.#events.push({ number: this.#number, event, text });
    if (this.#events.length > this.kept) this.#events.shift();
    for (const reader of this.#readers) if (concerns(event, reader.interest)) this.#send(reader, dated(text));
  }

  /** Tell a reader what it has missed since the event with an id, or to forget; that it is live; and what comes. */
  follow(response, interest, after) {
    if (this.#isClosed) return response.end();
    const seen = after === undefined ? this.#number : this.#numberOf(after);
    const missed = this.#events.filter(({ number, event }) => number > (seen ?? Infinity) && concerns(event, interest));
    const told = missed.map(({ text }) => text);
    if (seen === null) told.push(block("reset", this.#place, { reason: "events were missed that are no longer kept" }));
    told.push(block("live", this.#place, { heartbeat: this.heartbeat }));
    const reader = { response, interest };
    // Nothing is due, so that all that this reader is to know up to the newest event has been told.
    const beat = () => this.#send(reader, dated(`: heartbeat\nid: ${this.#place}\n\n`));
    reader.timer = setInterval(beat, this.heartbeat * 1000);
    this.#readers.add(reader);
    response.on("close", () => this.#leave(reader));
    response.on("error", () => {}); // it has gone, and is closed
    response.write(dated(told.join("")));
  }

  /** Tell up to which event somebody has read; null if that cannot be told from here. */
  #numberOf(place) {
    const [, epoch, digits] = /^(.*)-(\d{1,15})$/.exec(place) ?? [];
    const oldest = this.#number - this.#events.length; // up to this one nothing is kept
    return epoch === this.#epoch && Number(digits) >= oldest && Number(digits) <= this.#number ? Number(digits) : null;
  }

  #send(reader, text) {
    // Who takes nothing in comes back with its place, and is told what it missed, or to forget.
    if (reader.response.writableLength > MOST_WAITING) return reader.response.destroy();
    reader.timer.refresh();
    reader.response.write(text);
  }

  #leave(reader) {
    clearInterval(reader.timer);
    this.#readers.delete(reader);
  }

  /** Have all readers come to their end, now and later. */
  close() {
    this.#isClosed = true;
    for (const { response } of this.#readers) response.end();
  }
}
