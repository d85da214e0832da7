//! How this crate is held to the JSON test vectors that every language shares.
//!
//! Requests go through the daemon's very routes. Faults, errors and replies are for clients alone: they are read as a
//! client in Rust would read them.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::Value;

use crate::daemon::{self, Behaviour, BustRequest};
use crate::faults::{Applied, Band, Kind, Outcome, Row, Stage};
use crate::replies;
use crate::semverx::{self, Range, Spec, State, SwapFlags, Version};

/// What was checked, and what did not agree.
pub struct Report {
    /// Each file, and how many of its entries were checked.
    pub checked: Vec<(&'static str, usize)>,
    /// A line for each entry that is read otherwise here, which begins with the file's name.
    pub mismatches: Vec<String>,
}

/// Whether an entry agrees; if not, with what was found instead.
type Verdict = Result<(), String>;

/// Check every vector. A file that cannot be read is a mismatch.
pub async fn check(directory: &Path) -> Report {
    let mut report = Report {
        checked: Vec::new(),
        mismatches: Vec::new(),
    };
    if let Some(vectors) = report.read(directory, "versions.json") {
        versions(&mut report, vectors);
    }
    if let Some(vectors) = report.read(directory, "ranges.json") {
        ranges(&mut report, vectors);
    }
    if let Some(vectors) = report.read(directory, "requests.json") {
        requests(&mut report, vectors).await;
    }
    if let Some(vectors) = report.read(directory, "replies.json") {
        replies(&mut report, vectors);
    }
    if let Some(vectors) = report.read(directory, "errors.json") {
        errors(&mut report, vectors);
    }
    if let Some(vectors) = report.read(directory, "faults.json") {
        faults(&mut report, vectors);
    }
    report
}

impl Report {
    fn read<T: DeserializeOwned>(&mut self, directory: &Path, file: &'static str) -> Option<T> {
        self.checked.push((file, 0));
        let text = fs::read(directory.join(file)).map_err(|why| why.to_string());
        let vectors =
            text.and_then(|text| serde_json::from_slice(&text).map_err(|why| why.to_string()));
        vectors
            .map_err(|why| self.mismatches.push(format!("{file}: {why}")))
            .ok()
    }

    /// Count one entry of the file that was read last.
    fn count(&mut self, entry: impl Debug, verdict: Verdict) {
        if let Some((file, count)) = self.checked.last_mut() {
            *count += 1;
            if let Err(why) = verdict {
                self.mismatches.push(format!("{file}: {entry:?}: {why}"));
            }
        }
    }
}

fn same<T, U>(what: &str, found: &T, expected: &U) -> Verdict
where
    T: Debug + PartialEq<U> + ?Sized,
    U: Debug + ?Sized,
{
    if found == expected {
        Ok(())
    } else {
        Err(format!("{what} is {found:?}, expected {expected:?}"))
    }
}

fn refused<T>(read: Result<T, String>) -> Verdict {
    match read {
        Ok(_) => Err("it is read, expected that it is refused".to_owned()),
        Err(_) => Ok(()),
    }
}

#[derive(Deserialize)]
struct Versions {
    valid: Vec<VersionVector>,
    invalid: Vec<Invalid>,
    ascending: Vec<Vec<String>>,
    equal: Vec<(String, String)>,
}

#[derive(Deserialize)]
struct VersionVector {
    text: String,
    major: u64,
    minor: u64,
    patch: u64,
    states: [String; 3],
    prerelease: String,
    build: String,
    canonical: String,
    six_parts: String,
}

#[derive(Deserialize)]
struct Invalid {
    text: String,
}

fn versions(report: &mut Report, vectors: Versions) {
    for vector in &vectors.valid {
        report.count(&vector.text, version(vector));
    }
    for Invalid { text } in &vectors.invalid {
        report.count(text, refused(Version::parse(text)));
    }
    for texts in &vectors.ascending {
        for (below, text) in texts.iter().enumerate() {
            let compared = texts[..below]
                .iter()
                .try_for_each(|lower| compare(lower, text, Ordering::Less));
            report.count(text, compared);
        }
    }
    for (one, two) in &vectors.equal {
        report.count((one, two), compare(one, two, Ordering::Equal));
    }
}

fn version(vector: &VersionVector) -> Verdict {
    let version = Version::parse(&vector.text)?;
    let numbers = [vector.major, vector.minor, vector.patch];
    same("the numbers", &version.numbers, &numbers)?;
    same(
        "the states",
        &version.states.map(State::name),
        &vector.states,
    )?;
    same("the pre-release", &version.prerelease(), &vector.prerelease)?;
    same("the build", &version.build, &vector.build)?;
    same(
        "the canonical form",
        &version.to_string(),
        &vector.canonical,
    )?;
    same("the long form", &version.six_parts(), &vector.six_parts)?;
    for text in [&vector.canonical, &vector.six_parts] {
        let again = Version::parse(text)?;
        same("what is read again", &again.six_parts(), &vector.six_parts)?;
    }
    Ok(())
}

fn compare(one: &str, two: &str, expected: Ordering) -> Verdict {
    let (first, second) = (Version::parse(one)?, Version::parse(two)?);
    let (first, second) = (first.precedence(), second.precedence());
    same("the order", &first.cmp(&second), &expected)?;
    same(
        "the order the other way round",
        &second.cmp(&first),
        &expected.reverse(),
    )
}

#[derive(Deserialize)]
struct Ranges {
    matches: Vec<MatchVector>,
    invalid: Vec<Invalid>,
    specs: Vec<SpecVector>,
    invalid_specs: Vec<InvalidSpec>,
    best: Vec<BestVector>,
    swaps: Vec<SwapVector>,
}

#[derive(Deserialize)]
struct MatchVector {
    range: String,
    version: String,
    matches: bool,
}

#[derive(Deserialize)]
struct SpecVector {
    spec: String,
    name: String,
    range: String,
}

#[derive(Deserialize)]
struct InvalidSpec {
    spec: String,
}

#[derive(Deserialize)]
struct BestVector {
    range: String,
    versions: Vec<String>,
    best: Option<String>,
}

#[derive(Deserialize)]
struct SwapVector {
    current: String,
    candidate: String,
    flags: SwapFlags,
    allowed: bool,
    failed: Vec<String>,
}

fn ranges(report: &mut Report, vectors: Ranges) {
    for vector in &vectors.matches {
        report.count((&vector.range, &vector.version), matching(vector));
    }
    for Invalid { text } in &vectors.invalid {
        report.count(text, refused(Range::parse(text)));
    }
    for vector in &vectors.specs {
        report.count(&vector.spec, spec(vector));
    }
    for InvalidSpec { spec } in &vectors.invalid_specs {
        report.count(spec, refused(Spec::parse(spec)));
    }
    for vector in &vectors.best {
        report.count((&vector.range, &vector.versions), best(vector));
    }
    for vector in &vectors.swaps {
        report.count((&vector.current, &vector.candidate), swap(vector));
    }
}

fn matching(vector: &MatchVector) -> Verdict {
    let (range, version) = (
        Range::parse(&vector.range)?,
        Version::parse(&vector.version)?,
    );
    same(
        "whether it matches",
        &range.matches(&version),
        &vector.matches,
    )?;
    // What is written again must be the same range.
    let again = Range::parse(&range.to_string())?;
    same("the canonical form", &again.to_string(), &range.to_string())?;
    same(
        "whether its canonical form matches",
        &again.matches(&version),
        &vector.matches,
    )
}

fn spec(vector: &SpecVector) -> Verdict {
    let spec = Spec::parse(&vector.spec)?;
    same("the name", &spec.name, &vector.name)?;
    same("the range", &spec.range.to_string(), &vector.range)
}

fn best(vector: &BestVector) -> Verdict {
    let versions = vector.versions.iter().map(|text| Version::parse(text));
    let versions = versions.collect::<Result<Vec<_>, _>>()?;
    let best = Range::parse(&vector.range)?
        .best(&versions)
        .map(Version::to_string);
    same("the best", &best, &vector.best)
}

fn swap(vector: &SwapVector) -> Verdict {
    let (current, candidate) = (
        Version::parse(&vector.current)?,
        Version::parse(&vector.candidate)?,
    );
    let failed = semverx::unswappable(&current, &candidate, vector.flags);
    same("whether it is allowed", &failed.is_empty(), &vector.allowed)?;
    same("what failed", &failed[..], &vector.failed[..])
}

#[derive(Deserialize)]
struct Requests {
    requests: Vec<RequestVector>,
}

#[derive(Deserialize)]
struct RequestVector {
    description: String,
    #[serde(flatten)]
    body: Body,
    base: Base,
    reads: Option<Reads>,
    cache_key: Option<String>,
}

/// A body, as text or in hexadecimal.
#[derive(Deserialize)]
struct Body {
    #[serde(default, rename = "body")]
    text: String,
    #[serde(rename = "body_hex")]
    hex: Option<String>,
    fill: Option<Fill>,
}

#[derive(Deserialize)]
struct Fill {
    text: String,
    times: usize,
}

#[derive(Deserialize)]
struct Base {
    accepts: Option<bool>,
}

#[derive(Deserialize)]
struct Reads {
    target: Option<String>,
    strategy: String,
    binding: Option<String>,
    fault_tolerance: u8,
}

async fn requests(report: &mut Report, vectors: Requests) {
    let routes = daemon::routes(Behaviour::default());
    for vector in vectors.requests {
        let body = match vector.body.bytes() {
            Ok(body) => body,
            Err(why) => {
                report.count(&vector.description, Err(why));
                continue;
            }
        };
        let answer = warp::test::request()
            .method("POST")
            .path("/api/v1/bust")
            .header("content-type", "application/json")
            .body(&body)
            .reply(&routes)
            .await;
        let verdict = request(&vector, &body, answer.status().as_u16(), answer.body());
        report.count(&vector.description, verdict);
    }
}

impl Body {
    fn bytes(&self) -> Result<Vec<u8>, String> {
        if let Some(hex) = &self.hex {
            return (0..hex.len())
                .step_by(2)
                .map(|at| hex.get(at..at + 2).ok_or("half a byte"))
                .map(|byte| u8::from_str_radix(byte?, 16).map_err(|_| "not hexadecimal"))
                .collect::<Result<_, _>>()
                .map_err(|why| format!("body_hex is {why}"));
        }
        let body = match &self.fill {
            Some(fill) => self.text.replace("<fill>", &fill.text.repeat(fill.times)),
            None => self.text.clone(),
        };
        Ok(body.into_bytes())
    }
}

fn request(vector: &RequestVector, body: &[u8], status: u16, answer: &[u8]) -> Verdict {
    let accepts = match vector.base.accepts {
        None => status == 200,
        Some(accepts) => accepts,
    };
    let expected = if accepts { 200 } else { 400 };
    same("the status", &status, &expected)?;
    if !accepts {
        return Ok(());
    }
    let reply: Value = serde_json::from_slice(answer).map_err(|why| why.to_string())?;
    let read: BustRequest = serde_json::from_slice(body).map_err(|why| why.to_string())?;
    same(
        "fault_stage",
        &reply["fault_stage"],
        &Value::from(read.fault_tolerance),
    )?;
    if let Some(key) = &vector.cache_key {
        same("cache_key", &reply["cache_key"], key)?;
    }
    if let Some(reads) = &vector.reads {
        same("strategy", &read.strategy, &reads.strategy)?;
        same(
            "fault_tolerance",
            &read.fault_tolerance,
            &reads.fault_tolerance,
        )?;
        for (what, found, expected) in [
            ("target", &read.target, &reads.target),
            ("binding", &read.binding, &reads.binding),
        ] {
            if let Some(expected) = expected {
                same(what, found, expected)?;
            }
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Replies {
    replies: Vec<ReplyVector>,
}

#[derive(Deserialize)]
struct ReplyVector {
    description: String,
    target: String,
    #[serde(flatten)]
    body: Body,
    reads: Reply,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    Acknowledged,
    Malformed,
}

fn replies(report: &mut Report, vectors: Replies) {
    for vector in &vectors.replies {
        report.count(&vector.description, reply(vector));
    }
}

fn reply(vector: &ReplyVector) -> Verdict {
    let read = replies::acknowledge(&vector.target, &vector.body.bytes()?);
    match vector.reads {
        Reply::Acknowledged => read,
        Reply::Malformed => refused(read),
    }
}

#[derive(Deserialize)]
struct Errors {
    errors: Vec<ErrorVector>,
}

/// The body is not here: which fault an answer is, is for its status and its headers to say.
#[derive(Deserialize)]
struct ErrorVector {
    description: String,
    status: u16,
    headers: BTreeMap<String, String>,
    kind: Kind,
    stage: Stage,
    applied: Applied,
    next: bool,
    retry_after: Option<u64>,
}

fn errors(report: &mut Report, vectors: Errors) {
    let now = SystemTime::now();
    for vector in &vectors.errors {
        report.count(&vector.description, error(vector, now));
    }
}

fn error(vector: &ErrorVector, now: SystemTime) -> Verdict {
    let kind = Kind::of_status(vector.status).ok_or("it is no error")?;
    same("the kind", &kind, &vector.kind)?;
    same("the stage", &kind.row().stage, &vector.stage)?;
    same("whether it was applied", &kind.applied(vector.status), &vector.applied)?;
    same("whether the next is asked", &kind.row().next, &vector.next)?;
    let header = vector.headers.get("Retry-After");
    same(
        "the wait",
        &header.and_then(|text| replies::retry_after(text, now)),
        &vector.retry_after.map(Duration::from_secs),
    )
}

#[derive(Deserialize)]
struct Faults {
    stages: Vec<BandVector>,
    refused: Vec<RefusedStage>,
    escalate: Vec<EscalateVector>,
    kinds: Vec<KindVector>,
    weights: Vec<WeightVector>,
    calls: Vec<CallVector>,
    tolerances: Vec<ToleranceVector>,
    statuses: Vec<StatusVector>,
}

#[derive(Deserialize)]
struct BandVector {
    stage: Stage,
    band: Band,
}

#[derive(Deserialize)]
struct RefusedStage {
    description: String,
    stage: Value,
}

#[derive(Deserialize)]
struct EscalateVector {
    stage: Stage,
    incidents: u32,
    result: Stage,
}

#[derive(Deserialize)]
struct KindVector {
    kind: Kind,
    #[serde(flatten)]
    row: Row,
}

#[derive(Deserialize)]
struct WeightVector {
    kind: Kind,
    incidents: u32,
    stage: Stage,
    in_call: Stage,
}

#[derive(Deserialize)]
struct CallVector {
    outcome: Outcome,
    faults: Vec<Stage>,
    stage: Stage,
}

#[derive(Deserialize)]
struct ToleranceVector {
    stage: Stage,
    fault_tolerance: Stage,
    raises: bool,
}

#[derive(Deserialize)]
struct StatusVector {
    status: u16,
    kind: Option<Kind>,
    stage: Stage,
}

fn faults(report: &mut Report, vectors: Faults) {
    for BandVector { stage, band } in vectors.stages {
        report.count(stage, same("the band", &stage.band(), &band));
    }
    for RefusedStage { description, stage } in vectors.refused {
        let read = serde_json::from_value::<Stage>(stage).map_err(|why| why.to_string());
        report.count(description, refused(read));
    }
    for vector in vectors.escalate {
        let found = vector.stage.escalate(vector.incidents);
        let verdict = same("the stage", &found, &vector.result);
        report.count((vector.stage, vector.incidents), verdict);
    }
    for KindVector { kind, row } in vectors.kinds {
        report.count(kind, same("the row", &kind.row(), &row));
    }
    for vector in vectors.weights {
        report.count((vector.kind, vector.incidents), weight(&vector));
    }
    for vector in vectors.calls {
        let found = vector.outcome.stage(vector.faults.iter().copied());
        let verdict = same("the stage", &found, &vector.stage);
        report.count((vector.outcome, vector.faults), verdict);
    }
    for vector in vectors.tolerances {
        let found = vector.stage.raises(vector.fault_tolerance);
        let verdict = same("whether it raises", &found, &vector.raises);
        report.count((vector.stage, vector.fault_tolerance), verdict);
    }
    for vector in vectors.statuses {
        report.count(vector.status, status(&vector));
    }
}

fn weight(vector: &WeightVector) -> Verdict {
    let WeightVector {
        kind, incidents, ..
    } = *vector;
    same("the stage", &kind.stage(incidents), &vector.stage)?;
    same(
        "the stage in the call",
        &kind.stage_in_call(incidents),
        &vector.in_call,
    )
}

fn status(vector: &StatusVector) -> Verdict {
    let kind = Kind::of_status(vector.status);
    let stage = kind.map_or(Stage::CLEAN, |kind| kind.row().stage);
    same("the kind", &kind, &vector.kind)?;
    same("the stage", &stage, &vector.stage)
}
