// The fault scale 0 to 12: the same answers as pybustcall/faults.py, for clients in JavaScript.

export const CLEAN = 12;
const BANDS = ["panic", "exception", "warning", "silent"];
const OUTCOMES = { acknowledged: [9, 12], kept: [6, 8], failed: [0, 5] };

/** Where each kind of fault starts, whether another daemon may do better, whether it speaks against the daemon. */
export const TABLE = {
  slow: { stage: 10, next: false, incident: false },
  no_slot: { stage: 8, next: false, incident: false },
  unreachable: { stage: 8, next: true, incident: true },
  disconnected: { stage: 8, next: true, incident: true },
  timed_out: { stage: 8, next: true, incident: true },
  throttled: { stage: 8, next: true, incident: false },
  server_error: { stage: 7, next: true, incident: true },
  malformed: { stage: 5, next: true, incident: true },
  breaker_open: { stage: 5, next: true, incident: false },
  rejected: { stage: 4, next: false, incident: false },
  not_this_service: { stage: 3, next: true, incident: true },
  token_refused: { stage: 3, next: true, incident: true },
  not_allowed: { stage: 3, next: false, incident: false },
  incompatible: { stage: 3, next: true, incident: false },
  unsupported: { stage: 3, next: true, incident: false },
  certificate: { stage: 1, next: false, incident: true },
};

const KINDS = {
  401: "token_refused", 403: "not_allowed", 404: "not_this_service", 405: "not_this_service", 407: "token_refused",
  408: "disconnected", 410: "not_this_service", 421: "not_this_service", 425: "throttled", 426: "incompatible",
  428: "incompatible", 429: "throttled", 501: "not_this_service", 503: "throttled",
};

export const isStage = (value) => Number.isInteger(value) && value >= 0 && value <= CLEAN;
export const bandOf = (stage) => BANDS[Math.min(3, Math.floor(stage / 3))];
export const escalate = (stage, incidents) => Math.max(0, stage - incidents);
export const raises = (stage, tolerance) => stage < CLEAN - tolerance;

/** How an escalated fault counts towards its call: PANIC only if its kind starts there. */
export function weightInCall(kind, incidents) {
  const { stage } = TABLE[kind];
  return Math.max(escalate(stage, incidents), Math.min(stage, 3));
}

/** The worst of a call's faults, held inside the band of its outcome. */
export function callStage(outcome, faults) {
  const [lowest, highest] = OUTCOMES[outcome];
  return Math.max(lowest, Math.min(highest, CLEAN, ...faults));
}

/** The kind of fault that an HTTP status is, or null for success. */
export function kindOfStatus(status) {
  if (status === 200) return null;
  if (KINDS[status]) return KINDS[status];
  if (status >= 400 && status < 500) return "rejected";
  return status >= 500 && status < 600 ? "server_error" : "malformed";
}

/** Whether a bust that was answered with such a status may have been applied: not where there was no room for it. */
export const mayBeApplied = (status) =>
  status !== 507 && ["server_error", "throttled", "malformed", "disconnected"].includes(kindOfStatus(status));

/** The seconds that a Retry-After asks for, or null. */
export function retryAfter(text) {
  if (text === undefined) return null;
  if (/^\d+$/.test(text)) return Number(text);
  const date = /^[A-Z][a-z]{2}, /.test(text) ? Date.parse(text) : NaN;
  return Number.isNaN(date) ? null : Math.max(0, (date - Date.now()) / 1000);
}
