//! What a client must make of an answer: whether a body acknowledges a bust, and how long it is asked to wait.
//!
//! Read strictly, as JSON has it: what is not surely the acknowledgement of this very target is none. Which fault an
//! answer with another status than 200 is, is in `faults`.

use std::ops::RangeInclusive;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::daemon::cache_key_of;

const MAX_REPLY_BYTES: usize = 1024 * 1024;
const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];
const EPOCH: u64 = 719_469; // 1970-01-01, as `days` counts

/// A reply in either dialect. `null` is as not there; what nobody needs of it must be right all the same.
#[allow(dead_code)]
#[derive(Deserialize)]
struct BustReply {
    status: Option<String>,
    success: Option<bool>,
    cache_key: String,
    delegate: Option<String>,
    fault_stage: Option<u8>,
    execution_time_ms: Option<u64>,
    removed: Option<u64>,
}

/// Check that the body of a 200 acknowledges the bust of this target; if it does not, say why.
pub fn acknowledge(target: &str, body: &[u8]) -> Result<(), String> {
    if body.len() > MAX_REPLY_BYTES {
        return Err(format!("it is larger than {MAX_REPLY_BYTES} bytes"));
    }
    // By way of a map: serde would take a list of the fields' values for the reply, too.
    let reply = serde_json::from_slice::<Map<String, Value>>(body)
        .and_then(|fields| BustReply::deserialize(Value::Object(fields)))
        .map_err(|why| why.to_string())?;
    match (reply.status.as_deref(), reply.success) {
        (Some("success"), None | Some(true)) | (None, Some(true)) => {}
        _ => return Err("it does not say that it succeeded".to_owned()),
    }
    match reply.cache_key.as_str() {
        "" => Err("its cache_key is empty".to_owned()),
        key if key.starts_with("sha256:") && key != cache_key_of(target) => {
            Err("it is for another target".to_owned())
        }
        _ => Ok(()),
    }
}

/// Read a Retry-After, which is a whole number of seconds or a date (RFC 9110, section 10.2.3).
pub fn retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    if let Some(seconds) = number(text) {
        return Some(Duration::from_secs(seconds));
    }
    let until = UNIX_EPOCH + Duration::from_secs(date(text)?);
    Some(until.duration_since(now).unwrap_or_default())
}

/// Read a date such as `Sun, 06 Nov 1994 08:49:37 GMT` as seconds since 1970; one before that is 0.
fn date(text: &str) -> Option<u64> {
    let (day, month, year, time) = match text.split(' ').collect::<Vec<_>>()[..] {
        [_, day, month, year, time, "GMT"] => (day, month, year, time),
        _ => return None,
    };
    let (hour, minute, second) = match time.split(':').collect::<Vec<_>>()[..] {
        [hour, minute, second] => (hour, minute, second),
        _ => return None,
    };
    let month = MONTHS.iter().position(|name| *name == month)? as u64;
    let days = days(within(year, 0..=9999)?, month, within(day, 1..=31)?);
    let hours = days * 24 + within(hour, 0..=23)?;
    let seconds = (hours * 60 + within(minute, 0..=59)?) * 60 + within(second, 0..=60)?;
    Some(seconds.saturating_sub(EPOCH * 86_400))
}

/// How many days after 0000-02-29 a date lies; months count from 0. A year begins in March here, so that a leap day
/// ends its year.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month < 2 {
        (year.saturating_sub(1), month + 10)
    } else {
        (year, month - 2)
    };
    365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day
}

fn within(digits: &str, range: RangeInclusive<u64>) -> Option<u64> {
    number(digits).filter(|number| range.contains(number))
}

/// Read a number that is digits alone; one beyond all bounds is the largest there is.
fn number(digits: &str) -> Option<u64> {
    let are_digits = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    are_digits.then(|| digits.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_the_values_is_no_reply() {
        let body = br#"["success", null, "7", null, null, null, null]"#;
        assert!(acknowledge("a", body).is_err());
    }

    #[test]
    fn a_field_named_twice_counts_as_it_was_named_last() {
        for (body, acknowledged) in [
            (
                r#"{"success": true, "cache_key": 7, "cache_key": "7"}"#,
                true,
            ),
            (
                r#"{"success": true, "cache_key": "7", "cache_key": 7}"#,
                false,
            ),
        ] {
            assert_eq!(acknowledge("a", body.as_bytes()).is_ok(), acknowledged);
        }
    }

    #[test]
    fn a_date_is_waited_for() {
        for (text, seconds) in [
            ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
            ("Sun, 06 Nov 1994 08:49:37 GMT", 784_111_777),
            ("Mon, 28 Feb 2000 23:59:59 GMT", 951_782_399),
            ("Tue, 29 Feb 2000 00:00:00 GMT", 951_782_400),
            ("Fri, 01 Mar 2024 00:00:00 GMT", 1_709_251_200),
            ("Thu, 31 Dec 2099 23:59:59 GMT", 4_102_444_799),
        ] {
            let wait = Some(Duration::from_secs(seconds));
            assert_eq!(retry_after(text, UNIX_EPOCH), wait);
            let late = UNIX_EPOCH + Duration::from_secs(seconds + 1);
            assert_eq!(retry_after(text, late), Some(Duration::ZERO));
        }
    }

    #[test]
    fn what_is_no_wait_is_none() {
        for text in [
            "",
            "soon",
            "+7",
            "7 ",
            "Sun, 06 Nov 1994 08:49:37 CET",
            "Sun, 06 Nov 1994 08:49 GMT",
            "Sun, 06 Nov 1994 24:49:37 GMT",
            "Sun, 00 Nov 1994 08:49:37 GMT",
            "Sun, 06 nov 1994 08:49:37 GMT",
        ] {
            assert_eq!(retry_after(text, UNIX_EPOCH), None, "{text:?}");
        }
    }
}
