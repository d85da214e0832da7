//! The daemon: its three routes, what they answer, and what they do not check.
//!
//! What it leaves undone is deliberate, since the existing daemon leaves it undone too: a tolerance is any byte, a
//! strategy any text, a body of any size, and the history grows with every bust. Refusals are warp's own.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use warp::http::StatusCode;
use warp::reply::{self, Reply, Response};
use warp::{Filter, Rejection};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const NAME: &str = "rust";
const DEFAULT_STAGE: u8 = 6;
const PAGE: &str = "<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head>\
    <body><h1>Bad Gateway</h1><script>alert(1)</script></body></html>";

/// How the daemon differs from a well-behaved one.
#[derive(Default)]
pub struct Behaviour {
    /// How many faults its history begins with.
    pub history: u32,
    /// The stage it reports for every bust, in place of the tolerance asked for.
    pub stage: Option<u8>,
    /// Whether busts are answered with an HTML page, as by a broken proxy.
    pub html: bool,
}

/// What a bust asks for.
#[derive(Deserialize)]
pub struct BustRequest {
    pub target: String,
    #[serde(default = "default_strategy")]
    pub strategy: String,
    #[serde(default = "default_binding")]
    pub binding: String,
    #[serde(default = "default_tolerance")]
    pub fault_tolerance: u8,
}

fn default_strategy() -> String {
    "dimensional".to_owned()
}

fn default_binding() -> String {
    "unknown".to_owned()
}

fn default_tolerance() -> u8 {
    DEFAULT_STAGE
}

#[derive(Serialize)]
struct BustReply {
    status: &'static str,
    cache_key: String,
    delegate: &'static str,
    fault_stage: u8,
    execution_time_ms: u64,
}

#[derive(Serialize)]
struct FaultRecord {
    timestamp: String,
    binding: String,
    fault_stage: u8,
    message: String,
}

#[derive(Serialize)]
struct BindingStatus {
    status: &'static str,
    version: Option<&'static str>,
}

#[derive(Serialize)]
struct Status<'a> {
    daemon_pid: u32,
    bindings: BTreeMap<&'static str, BindingStatus>,
    cache_size: &'static str,
    fault_history: &'a [FaultRecord],
}

#[derive(Serialize)]
struct BindingCapabilities {
    binding: &'static str,
    capabilities: &'static [&'static str],
    semverx: String,
    stage: u8,
    p2p_enabled: bool,
}

struct Daemon {
    behaviour: Behaviour,
    history: Mutex<Vec<FaultRecord>>,
}

/// Listen on a port of 127.0.0.1; return the address, and the future that serves it.
pub fn bind(
    port: u16,
    behaviour: Behaviour,
) -> Result<(SocketAddr, impl Future<Output = ()>), warp::Error> {
    warp::serve(routes(behaviour)).try_bind_ephemeral((Ipv4Addr::LOCALHOST, port))
}

/// The routes of a daemon. Paths come before methods: what is at no route is a 404, whatever the method.
pub fn routes(
    behaviour: Behaviour,
) -> impl Filter<Extract = (impl Reply,), Error = Rejection> + Clone {
    let daemon = Arc::new(Daemon::new(behaviour));
    let daemon = warp::any().map(move || Arc::clone(&daemon));
    let bust = warp::path!("api" / "v1" / "bust")
        .and(warp::post())
        .and(warp::body::json())
        .and(daemon.clone())
        .map(|request: BustRequest, daemon: Arc<Daemon>| daemon.bust(request));
    let status = warp::path!("api" / "v1" / "status")
        .and(warp::get())
        .and(daemon)
        .map(|daemon: Arc<Daemon>| daemon.status());
    let capabilities = warp::path!("api" / "v1" / "bindings" / "capabilities")
        .and(warp::get())
        .map(|| reply::json(&capabilities()));
    bust.or(status).or(capabilities)
}

impl Daemon {
    fn new(behaviour: Behaviour) -> Self {
        let begun = SystemTime::now() - Duration::from_secs(u64::from(behaviour.history));
        let history = (0..behaviour.history)
            .map(|number| FaultRecord {
                timestamp: timestamp(begun + Duration::from_secs(u64::from(number))),
                binding: "node".to_owned(),
                fault_stage: (number % 13) as u8,
                message: format!("seeded fault {number}"),
            })
            .collect();
        Daemon {
            behaviour,
            history: Mutex::new(history),
        }
    }

    fn bust(&self, request: BustRequest) -> Response {
        if self.behaviour.html {
            return reply::with_status(reply::html(PAGE), StatusCode::BAD_GATEWAY).into_response();
        }
        let begun = Instant::now();
        let fault_stage = self.behaviour.stage.unwrap_or(request.fault_tolerance);
        let cache_key = cache_key_of(&request.target);
        self.history().push(FaultRecord {
            timestamp: timestamp(SystemTime::now()),
            binding: request.binding,
            fault_stage,
            message: format!("bust of {cache_key} by {}", request.strategy),
        });
        reply::json(&BustReply {
            status: "success",
            cache_key,
            delegate: NAME,
            fault_stage,
            execution_time_ms: begun.elapsed().as_millis() as u64,
        })
        .into_response()
    }

    fn status(&self) -> impl Reply {
        let up = |version| BindingStatus {
            status: "active",
            version,
        };
        reply::json(&Status {
            daemon_pid: process::id(),
            bindings: BTreeMap::from([
                (NAME, up(Some(VERSION))),
                ("node", up(None)),
                ("python", up(None)),
            ]),
            cache_size: "1.2MB",
            fault_history: &self.history(),
        })
    }

    fn history(&self) -> MutexGuard<'_, Vec<FaultRecord>> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn capabilities() -> BTreeMap<&'static str, BindingCapabilities> {
    let of = |binding, capabilities, stage, p2p_enabled| BindingCapabilities {
        binding,
        capabilities,
        semverx: format!("v{VERSION}"),
        stage,
        p2p_enabled,
    };
    BTreeMap::from([
        (NAME, of(NAME, &["cache.bust", "cache.status"], 12, true)),
        ("node", of("node", &["cache.bust"], DEFAULT_STAGE, true)),
        (
            "python",
            of("python", &["cache.bust"], DEFAULT_STAGE, false),
        ),
    ])
}

/// The cache key that answers for a target: "sha256:" and the hex SHA-256 of its UTF-8 bytes.
pub fn cache_key_of(target: &str) -> String {
    let digest = Sha256::digest(target.as_bytes());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// An instant in UTC as RFC 3339, with nine digits of fraction.
fn timestamp(instant: SystemTime) -> String {
    let since = instant.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (year, month, day) = date((since.as_secs() / 86_400) as i64);
    let second = since.as_secs() % 86_400;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    )
}

/// The date that lies some days after 1970-01-01. Years begin in March here, so that a leap day ends its year.
fn date(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468; // since 0000-03-01
    let era = days.div_euclid(146_097); // 400 years each
    let day = days.rem_euclid(146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153; // 0 is March
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (year + era * 400 + next, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_has_nine_digits_and_the_right_day() {
        for (seconds, nanoseconds, text) in [
            (0, 0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_399, 1, "2000-02-28T23:59:59.000000001Z"),
            (951_782_400, 0, "2000-02-29T00:00:00.000000000Z"),
            (1_709_251_200, 5, "2024-03-01T00:00:00.000000005Z"),
            (4_102_444_799, 999_999_999, "2099-12-31T23:59:59.999999999Z"),
        ] {
            let instant = UNIX_EPOCH + Duration::new(seconds, nanoseconds);
            assert_eq!(timestamp(instant), text);
        }
    }
}
