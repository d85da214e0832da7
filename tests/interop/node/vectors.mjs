// Checks this daemon's own implementation against the test vectors that every language shares.
import { readFileSync } from "node:fs";
import { isDeepStrictEqual } from "node:util";
import { join } from "node:path";
import { StreamParser, drops } from "../../../docs/how-to/clients/follow.mjs";
import { concerns } from "./events.mjs";
import * as faults from "./faults.mjs";
import { doubt } from "./replies.mjs";
import * as semverx from "./semverx.mjs";

/** Make the bytes of the body that an entry describes. */
function bodyOf({ body, body_hex: hex, fill }) {
  if (hex !== undefined) return Buffer.from(hex, "hex");
  return Buffer.from(fill ? body.replace("<fill>", () => fill.text.repeat(fill.times)) : body);
}

function* checkRequests({ requests }, { readBust, cacheKeyOf }) {
  for (const { description, strict, reads, cache_key: key, ...body } of requests) {
    let [status, field, read] = [200, null, {}];
    try {
      const bytes = bodyOf(body);
      if (bytes.length > 65536) status = 413;
      else read = readBust(bytes);
    } catch (error) {
      [status, field] = [error.status, error.field ?? null];
    }
    yield [`${description}: status`, strict.status.includes(status), true];
    if (status === 422) yield [`${description}: field`, field, strict.field];
    if (status === 200) {
      for (const name in reads) yield [`${description}: ${name}`, read[name], reads[name]];
      yield [`${description}: key`, cacheKeyOf(read.target), key];
    }
  }
}

function* checkReplies({ replies }) {
  for (const { description, target, reads, ...body } of replies) {
    const bytes = bodyOf(body);
    const wrong = bytes.length > 1024 * 1024 ? "too large" : doubt(target, bytes);
    yield [description, wrong === null ? "acknowledged" : "malformed", reads];
  }
}

function* checkErrors({ errors }) {
  for (const { description, status, headers, kind, stage, applied, next, retry_after: wait } of errors) {
    const found = faults.kindOfStatus(status);
    const row = faults.TABLE[found];
    const said = faults.mayBeApplied(status) ? "maybe" : "no";
    yield [description, [found, row.stage, said, row.next], [kind, stage, applied, next]];
    yield [`${description}: wait`, faults.retryAfter(headers["Retry-After"]), wait];
  }
}

function* checkFaults({ stages, refused, escalate, kinds, weights, calls, tolerances, statuses }) {
  for (const { stage, band } of stages) yield [`band of ${stage}`, faults.isStage(stage) && faults.bandOf(stage), band];
  for (const { description, stage } of refused) yield [description, faults.isStage(stage), false];
  for (const { stage, incidents, result } of escalate)
    yield [`escalate(${stage}, ${incidents})`, faults.escalate(stage, incidents), result];
  for (const { kind, ...row } of kinds) yield [kind, faults.TABLE[kind], row];
  for (const { kind, incidents, stage, in_call: inCall } of weights) {
    const found = [faults.escalate(faults.TABLE[kind].stage, incidents), faults.weightInCall(kind, incidents)];
    yield [`${kind} after ${incidents}`, found, [stage, inCall]];
  }
  for (const { outcome, faults: below, stage } of calls)
    yield [`${outcome} after ${below}`, faults.callStage(outcome, below), stage];
  for (const { stage, fault_tolerance: tolerance, raises } of tolerances)
    yield [`raises(${stage}, ${tolerance})`, faults.raises(stage, tolerance), raises];
  for (const { status, kind, stage } of statuses) {
    const found = faults.kindOfStatus(status);
    yield [`status ${status}`, [found, faults.TABLE[found]?.stage ?? faults.CLEAN], [kind, stage]];
  }
}

function readable(parse, text) {
  try {
    return Boolean(parse(text));
  } catch (error) {
    if (error instanceof SyntaxError) return false;
    throw error;
  }
}

function* checkUnreadable(parse, entries, name) {
  for (const { why, [name]: text } of entries) yield [`${JSON.stringify(text)} (${why})`, readable(parse, text), false];
}

function* checkVersions({ valid, invalid, ascending, equal }) {
  const compare = (a, b) => Math.sign(semverx.compare(semverx.parseVersion(a), semverx.parseVersion(b)));
  for (const { text, major, minor, patch, ...expected } of valid) {
    const version = semverx.parseVersion(text);
    const { numbers, states, build } = version;
    yield [text, numbers, [major, minor, patch]];
    const [canonical, six_parts] = [semverx.canonical(version), semverx.sixParts(version)];
    yield [text, { states, prerelease: version.prerelease.join("."), build, canonical, six_parts }, expected];
  }
  yield* checkUnreadable(semverx.parseVersion, invalid, "text");
  for (const versions of ascending)
    for (const [index, one] of versions.entries())
      for (const [above, other] of versions.entries())
        yield [`${one} and ${other}`, compare(one, other), Math.sign(index - above)];
  for (const [one, other] of equal) yield [`${one} and ${other}`, compare(one, other), 0];
}

function* checkRanges({ matches, invalid, specs, invalid_specs: invalidSpecs, best, swaps }) {
  for (const { range, version, matches: expected } of matches) {
    const parsed = semverx.parseRange(range);
    yield [`${version} in ${range}`, semverx.matches(parsed, semverx.parseVersion(version)), expected];
    const again = semverx.parseRange(semverx.rangeText(parsed));
    yield [`${version} in ${range}, written again`, semverx.matches(again, semverx.parseVersion(version)), expected];
  }
  yield* checkUnreadable(semverx.parseRange, invalid, "text");
  for (const { spec, ...expected } of specs) {
    const { name, range } = semverx.parseSpec(spec);
    yield [spec, { name, range: semverx.rangeText(range) }, expected];
  }
  yield* checkUnreadable(semverx.parseSpec, invalidSpecs, "spec");
  for (const { range, versions, best: expected } of best) {
    const found = semverx.best(semverx.parseRange(range), versions.map(semverx.parseVersion));
    yield [`best of ${versions} for ${range}`, found && semverx.canonical(found), expected];
  }
  for (const { current, candidate, flags, allowed, failed } of swaps) {
    const found = semverx.swapFailures(semverx.parseVersion(current), semverx.parseVersion(candidate), flags);
    yield [`${candidate} for ${current} with ${JSON.stringify(flags)}`, [!found.length, found], [allowed, failed]];
  }
}

/** Read a stream that comes in pieces: its events, and the last id; or null if it is none. */
function readStream(pieces) {
  const parser = new StreamParser();
  try {
    const blocks = pieces.flatMap((piece) => [...parser.feed(piece)]);
    return [blocks.filter(({ data }) => data !== null), blocks.at(-1)?.id ?? ""];
  } catch {
    return [null, null];
  }
}

function* checkEvents({ streams, concerns: heard, drops: held }) {
  for (const { description, events, last_id: last, ...body } of streams) {
    const bytes = bodyOf(body);
    const told = events?.map((event) => ({ ...event, data: bodyOf({ body: event.data, fill: body.fill }).toString() }));
    const places = bytes.length < 1000 ? [...bytes.keys()].slice(1) : [];
    const cuts = [[bytes], [...bytes].map((byte) => Buffer.of(byte))];
    cuts.push(...places.map((place) => [bytes.subarray(0, place), bytes.subarray(place)]));
    for (const pieces of cuts)
      yield [`${description}: in ${pieces.length} pieces`, readStream(pieces), [told ?? null, last]];
  }
  for (const { event, interest, concerns: expected } of heard)
    yield [`${JSON.stringify(event)} for ${JSON.stringify(interest)}`, concerns(event, interest), expected];
  for (const { event, key, tags, drops: expected } of held)
    yield [`${JSON.stringify(event)} and ${key} with ${tags}`, drops(event, key, tags), expected];
}

const CHECKS = {
  "versions.json": checkVersions,
  "ranges.json": checkRanges,
  "requests.json": checkRequests,
  "replies.json": checkReplies,
  "errors.json": checkErrors,
  "faults.json": checkFaults,
  "events.json": checkEvents,
};

/** Check every file; print what does not match, and how much was checked; tell whether everything matched. */
export function checkVectors(directory, daemon) {
  let allMatch = true;
  for (const [name, check] of Object.entries(CHECKS)) {
    let [count, wrong] = [0, 0];
    for (const [what, found, expected] of check(JSON.parse(readFileSync(join(directory, name), "utf8")), daemon)) {
      count += 1;
      if (isDeepStrictEqual(found, expected)) continue;
      wrong += 1;
      console.log(`${name}: ${what}: found ${JSON.stringify(found)}, expected ${JSON.stringify(expected)}`);
    }
    console.log(`${name}: ${count} checked, ${wrong} wrong`);
    allMatch &&= wrong === 0 && count > 0;
  }
  return allMatch;
}
