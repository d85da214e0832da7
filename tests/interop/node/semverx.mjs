// SemverX versions, ranges and hot swaps: the same answers as pybustcall/semverx.py, which says what the rules are for.
// Whatever cannot be read throws a SyntaxError.

const STATES = ["stable", "legacy", "experimental"]; // the most trusted first
const WILDCARDS = ["x", "X", "*"];
const PARTS = ["major", "minor", "patch"];
const MAX_ALTERNATIVES = 32;

function refuse(why) {
  throw new SyntaxError(why);
}

function number(word) {
  if (!/^(0|[1-9][0-9]*)$/.test(word) || Number(word) > Number.MAX_SAFE_INTEGER) refuse("no number of a version");
  return Number(word);
}

function stateOf(word) {
  const state = word.toLowerCase();
  return STATES.includes(state) ? state : refuse("no state");
}

/** The state that SemVer's spelling gives to all three numbers. */
function implied([first]) {
  if (first === undefined) return "stable";
  return STATES.includes(String(first).toLowerCase()) ? String(first).toLowerCase() : "experimental";
}

/** Divide a version, or what looks like one, into its parts between dots, its pre-release and its build. */
function divide(text) {
  const [, core, prerelease, build] = /^([^+-]*)(?:-([^+]*))?(?:\+(.*))?$/.exec(text) ?? refuse("no version");
  const identifiers = (joined) => {
    const found = joined === undefined ? [] : joined.split(".");
    if (!found.every((one) => /^[0-9A-Za-z-]+$/.test(one))) refuse("an identifier is empty or has other characters");
    return found;
  };
  return {
    parts: core.replace(/^[vV](?=[0-9])/, "").split("."),
    prerelease: identifiers(prerelease).map((one) => (/^[0-9]+$/.test(one) ? number(one) : one)),
    build: identifiers(build).join("."),
    bare: prerelease === undefined && build === undefined,
  };
}

export function parseVersion(text) {
  if (text.length > 256 || !/^[0-9A-Za-z.+-]*$/.test(text)) refuse("too long, or characters that no version has");
  const { parts, prerelease, build, bare } = divide(text);
  if (parts.length === 3) {
    const states = Array(3).fill(implied(prerelease));
    return { numbers: parts.map(number), states, prerelease, build };
  }
  if (parts.length !== 6 || !bare) refuse("neither three parts nor six");
  const every = (offset) => parts.filter((_, index) => index % 2 === offset);
  return { numbers: every(0).map(number), states: every(1).map(stateOf), prerelease: [], build: "" };
}

const semver = (numbers, prerelease) => numbers.join(".") + (prerelease.length ? `-${prerelease.join(".")}` : "");

export const sixParts = ({ numbers, states }) => numbers.map((one, index) => `${one}.${states[index]}`).join(".");

export function canonical(version) {
  const { numbers, states, prerelease, build } = version;
  if (states.some((state) => state !== implied(prerelease))) return sixParts(version);
  return semver(numbers, prerelease) + (build && `+${build}`);
}

const order = (a, b) => (a < b ? -1 : Number(a > b));

/** SemVer 2.0, section 11: below 0 if `a` comes before `b`, 0 if neither does. States and build have no part in it. */
export function compare(a, b) {
  for (let index = 0; index < a.numbers.length; index += 1)
    if (a.numbers[index] !== b.numbers[index]) return order(a.numbers[index], b.numbers[index]);
  const [ours, theirs] = [a.prerelease, b.prerelease];
  if (!ours.length || !theirs.length) return order(theirs.length, ours.length);
  for (let index = 0; index < Math.min(ours.length, theirs.length); index += 1) {
    const [one, other] = [ours[index], theirs[index]];
    if (typeof one !== typeof other) return typeof one === "number" ? -1 : 1;
    if (one !== other) return order(one, other);
  }
  return order(ours.length, theirs.length);
}

// Ranges: a list of alternatives, each a list of terms

const HOLDS = {
  "=": (by) => by === 0, ">": (by) => by > 0, "<": (by) => by < 0,
  ">=": (by) => by >= 0, "<=": (by) => by <= 0, "^": (by) => by >= 0, "~": (by) => by >= 0,
};
const KEPT = { "^": 1, "~": 2 };

/** Read numbers of which the last may be wildcards; return those that are none. */
function leading(words) {
  const end = words.findIndex((word) => WILDCARDS.includes(word));
  const numbers = end < 0 ? words : words.slice(0, end);
  if (end >= 0 && !words.slice(end).every((word) => WILDCARDS.includes(word))) refuse("a number after a wildcard");
  return numbers.map(number);
}

/** Read a state of a pattern: those that it allows, in order; none of them is named by `*`. */
function statesOf(word) {
  if (word === "*") return [];
  const braced = /^\{(.*)\}$/.exec(word);
  const words = (braced ? braced[1].split("|") : [word]).map(stateOf);
  if (new Set(words).size !== words.length) refuse("a state twice");
  return STATES.filter((state) => words.includes(state));
}

function parseTerm(operator, word) {
  if (word.toLowerCase() === "latest" && !operator) return { operator: "=", numbers: [], prerelease: [] };
  const { parts, prerelease, bare } = divide(word);
  if (parts.length === 6 && bare && [undefined, "="].includes(operator)) {
    const every = (offset) => parts.filter((_, index) => index % 2 === offset);
    return { operator: "=", numbers: leading(every(0)), prerelease, states: every(1).map(statesOf) };
  }
  if (parts.length === 6) return { operator, ...parseVersion(word), states: undefined };
  if (parts.length > 3) refuse("too many parts");
  const numbers = leading(parts);
  if (operator && !numbers.length) refuse("an operator needs a number");
  if (numbers.length === 3) return { operator: operator ?? "=", ...parseVersion(word), states: undefined };
  if (!bare) refuse("a partial version has no pre-release and no build");
  return { operator: operator ?? "=", numbers, prerelease };
}

function parseTerms(text) {
  return text.split(",").flatMap((piece) => {
    const found = [...piece.matchAll(/ *([<>]=?|[=^~])? *([^ ]+)/g)];
    if (!found.length) refuse("an empty term");
    return found.map(([, operator, word]) => parseTerm(operator, word));
  });
}

export function parseRange(text) {
  if (text.length > 1024 || !/^[ -~]*$/.test(text)) refuse("too long, or characters that no range has");
  const alternatives = text.split("||");
  if (alternatives.length > MAX_ALTERNATIVES) refuse("too many alternatives");
  return alternatives.map(parseTerms);
}

function termMatches({ operator, numbers, prerelease, states }, version) {
  const theirs = { numbers: version.numbers.slice(0, numbers.length), prerelease: version.prerelease };
  const same = (count) => numbers.slice(0, count).every((one, index) => one === version.numbers[index]);
  if (states) return same(3) && states.every((some, index) => !some.length || some.includes(version.states[index]));
  if (numbers.length < 3) theirs.prerelease = []; // what a partial version lacks has no part in the comparison
  return HOLDS[operator](compare(theirs, { numbers, prerelease })) && same(KEPT[operator] ?? 0);
}

export const matches = (range, version) => range.some((terms) => terms.every((term) => termMatches(term, version)));

function termText({ operator, numbers, prerelease, states }) {
  if (states) {
    const shown = states.map((some) => (some.length > 1 ? `{${some.join("|")}}` : some[0] ?? "*"));
    return shown.map((state, index) => `${numbers[index] ?? "*"}.${state}`).join(".");
  }
  if (!numbers.length) return "*";
  if (operator !== "=") return operator + semver(numbers, prerelease);
  return semver(numbers, prerelease) + (numbers.length < 3 ? ".x" : "");
}

export const rangeText = (range) => range.map((terms) => terms.map(termText).join(" ")).join(" || ");

const stateOfWhole = ({ states }) => Math.max(...states.map((state) => STATES.indexOf(state)));

/** The highest match: of the stable ones and those of a state that the range names, else legacy, else experimental. */
export function best(range, versions) {
  const named = range.flat().flatMap(({ operator, prerelease, states = [] }) =>
    prerelease.length && operator !== "<" ? [implied(prerelease)] : states.flat());
  const rank = (version) => (named.includes(STATES[stateOfWhole(version)]) ? 0 : stateOfWhole(version));
  const better = (a, b) => rank(a) - rank(b) || compare(b, a) || stateOfWhole(a) - stateOfWhole(b);
  return versions.filter((version) => matches(range, version)).sort(better)[0] ?? null; // sort keeps equals in order
}

const UNSEEN = [
  String.raw`\0- @\x7f-\xa0\xad\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f`,
  String.raw`\u205f-\u206f\u3000\ufeff\ufff9-\ufffb\p{Surrogate}`,
].join("");
const NO_NAME = new RegExp(`[${UNSEEN}]`, "u");

/** Read `name@range`, or `@scope/name@range`; without a range any version will do. */
export function parseSpec(text) {
  const at = text.lastIndexOf("@");
  const [name, range] = at > 0 ? [text.slice(0, at), text.slice(at + 1)] : [text, "*"];
  const bare = name.startsWith("@") ? name.slice(1) : name;
  if (!bare || NO_NAME.test(bare) || Buffer.byteLength(name) > 256) refuse("no name");
  if (bare !== name && !/^[^/]+\/./s.test(bare)) refuse("no name in the scope");
  return { name, range: parseRange(range) };
}

const SWAPS = {
  stable: { stable: ["same_major"], legacy: ["rollback"], experimental: ["allow_experimental"] },
  legacy: { stable: ["migrate"], legacy: ["rollback"], experimental: ["allow_experimental"] },
  experimental: { stable: ["same_major", "validated"], legacy: ["rollback"], experimental: ["allow_experimental"] },
};

/** Which parts keep the candidate from taking the current version's place at run time; none: it may. */
export function swapFailures(current, candidate, flags) {
  const given = { ...flags, same_major: current.numbers[0] === candidate.numbers[0] };
  const needs = (index) => SWAPS[current.states[index]][candidate.states[index]];
  return PARTS.filter((_, index) => !needs(index).every((need) => given[need]));
}
