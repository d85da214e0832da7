//! The fault scale 0 to 12, as a client weighs it: lower is worse, and 12 is a clean success.
//!
//! A daemon of the base protocol knows nothing of it; this is here so that the scale, too, is held to the test vectors
//! in Rust. Which kind of fault an answer is, is told by its status alone; what a reply says is in `replies`.

use serde::Deserialize;

/// A number on the scale, and nothing else that JSON can say. A fault tolerance is counted on the same scale.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd)]
#[serde(try_from = "u8")]
pub struct Stage(u8);

impl TryFrom<u8> for Stage {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, Self::Error> {
        if number <= Stage::CLEAN.0 {
            Ok(Stage(number))
        } else {
            Err(format!("a fault stage is 0 to 12, not {number}"))
        }
    }
}

impl Stage {
    /// The stage of a clean success.
    pub const CLEAN: Stage = Stage(12);

    /// The lowest stage that a daemon's incidents alone can bring upon a call.
    const LEAST_ESCALATED: Stage = Stage(3);

    pub fn band(self) -> Band {
        match self.0 {
            0..=2 => Band::Panic,
            3..=5 => Band::Exception,
            6..=8 => Band::Warning,
            _ => Band::Silent,
        }
    }

    /// This stage, worsened by one for each incident in a row before it; never below 0.
    pub fn escalate(self, incidents: u32) -> Stage {
        Stage(
            self.0
                .saturating_sub(incidents.try_into().unwrap_or(u8::MAX)),
        )
    }

    /// Whether a call of this stage raises: iff stage < 12 - tolerance.
    pub fn raises(self, tolerance: Stage) -> bool {
        self.0 < Stage::CLEAN.0 - tolerance.0
    }
}

/// What the stages mean, three or four of them at a time.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Band {
    Panic,
    Exception,
    Warning,
    Silent,
}

/// What became of a call.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Acknowledged,
    /// Stored or accepted: it will be delivered, and is not yet.
    Kept,
    Failed,
}

impl Outcome {
    /// The stage of a call: the meet of its faults, held inside the band of its outcome.
    pub fn stage(self, faults: impl IntoIterator<Item = Stage>) -> Stage {
        let (lowest, highest) = match self {
            Outcome::Acknowledged => (Stage(9), Stage::CLEAN),
            Outcome::Kept => (Stage(6), Stage(8)),
            Outcome::Failed => (Stage(0), Stage(5)),
        };
        meet(faults).clamp(lowest, highest)
    }
}

/// The worst of some stages; of none, a clean success.
pub fn meet(stages: impl IntoIterator<Item = Stage>) -> Stage {
    stages.into_iter().min().unwrap_or(Stage::CLEAN)
}

/// Whether a bust that failed may have been applied.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Applied {
    No,
    Maybe,
}

/// What went wrong with one attempt.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Slow,
    NoSlot,
    Unreachable,
    Disconnected,
    TimedOut,
    Throttled,
    ServerError,
    Malformed,
    BreakerOpen,
    Rejected,
    NotThisService,
    TokenRefused,
    NotAllowed,
    Incompatible,
    Unsupported,
    Certificate,
}

/// What follows from a kind of fault.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
pub struct Row {
    /// Where this kind starts on the scale.
    pub stage: Stage,
    /// Whether another daemon may do better.
    pub next: bool,
    /// Whether it speaks against the daemon's health.
    pub incident: bool,
}

impl Kind {
    /// The kind of fault that an HTTP status is; none for 200, the one success of the base protocol.
    ///
    /// An unknown status of 4xx or 5xx is as its class is; a redirect, another 2xx and what HTTP does not know at all
    /// are malformed answers.
    pub fn of_status(status: u16) -> Option<Kind> {
        let kind = match status {
            200 => return None,
            401 | 407 => Kind::TokenRefused,
            403 => Kind::NotAllowed,
            404 | 405 | 410 | 421 | 501 => Kind::NotThisService,
            408 => Kind::Disconnected,
            425 | 429 | 503 => Kind::Throttled,
            426 | 428 => Kind::Incompatible,
            400..=499 => Kind::Rejected,
            500..=599 => Kind::ServerError,
            _ => Kind::Malformed,
        };
        Some(kind)
    }

    /// This kind's row of the fault table.
    pub fn row(self) -> Row {
        let (stage, next, incident) = match self {
            Kind::Slow => (10, false, false),
            Kind::NoSlot => (8, false, false),
            Kind::Unreachable | Kind::Disconnected | Kind::TimedOut => (8, true, true),
            Kind::Throttled => (8, true, false),
            Kind::ServerError => (7, true, true),
            Kind::Malformed => (5, true, true),
            Kind::BreakerOpen => (5, true, false),
            Kind::Rejected => (4, false, false),
            Kind::NotThisService | Kind::TokenRefused => (3, true, true),
            Kind::NotAllowed => (3, false, false),
            Kind::Incompatible => (3, true, false),
            Kind::Unsupported => (3, true, false),
            Kind::Certificate => (1, false, true),
        };
        Row {
            stage: Stage(stage),
            next,
            incident,
        }
    }

    /// The stage of such a fault at a daemon, after so many incidents in a row there.
    pub fn stage(self, incidents: u32) -> Stage {
        self.row().stage.escalate(incidents)
    }

    /// The stage with which it counts towards its call: a panic only if its kind starts as one.
    pub fn stage_in_call(self, incidents: u32) -> Stage {
        let floor = self.row().stage.min(Stage::LEAST_ESCALATED);
        self.stage(incidents).max(floor)
    }

    /// Whether a bust that was answered with such a status may have been applied: a server that fails may have done the
    /// work before, but one that has no room for it (507) did nothing.
    pub fn applied(self, status: u16) -> Applied {
        match self {
            Kind::ServerError if status == 507 => Applied::No,
            Kind::ServerError | Kind::Throttled | Kind::Malformed | Kind::Disconnected => {
                Applied::Maybe
            }
            _ => Applied::No,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale() -> impl Iterator<Item = Stage> {
        (0..=12).map(Stage)
    }

    #[test]
    fn the_scale_ends_at_12() {
        let stages: Vec<Stage> = (0..=u8::MAX)
            .filter_map(|number| number.try_into().ok())
            .collect();
        assert!(scale().eq(stages));
    }

    #[test]
    fn incidents_add_up() {
        for stage in scale() {
            for (one, two) in [(0, 0), (1, 2), (5, 9), (300, u32::MAX - 300)] {
                assert_eq!(stage.escalate(one).escalate(two), stage.escalate(one + two));
            }
        }
    }

    #[test]
    fn a_better_outcome_never_has_a_worse_stage() {
        for (one, two) in scale().flat_map(|one| scale().map(move |two| (one, two))) {
            assert!(Outcome::Acknowledged.stage([one]) > Outcome::Kept.stage([two]));
            assert!(Outcome::Kept.stage([one]) > Outcome::Failed.stage([two]));
        }
    }
}
