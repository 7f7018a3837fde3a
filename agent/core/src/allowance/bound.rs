//! What bounds a limit, and what to do about it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Amount, Measure, What};
use crate::units::{Bytes, Cpu};

/// The most that something may become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// Bytes, or millionths of a CPU.
    pub most: u64,
    /// What says so.
    pub by: By,
}

/// What bounds a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum By {
    /// `max` of a LimitRange.
    RangeMax {
        /// Its name.
        name: String,
        /// Of what.
        what: What,
        /// Whether of a pod's sum.
        is_of_pod: bool,
        /// The maximum.
        max: u64,
    },
    /// `maxLimitRequestRatio` of a LimitRange.
    RangeRatio {
        /// Its name.
        name: String,
        /// Of what.
        what: What,
        /// Whether of a pod's sum.
        is_of_pod: bool,
        /// The ratio, in thousandths.
        per_mille: u64,
        /// The request.
        request: u64,
    },
    /// A ResourceQuota.
    Quota {
        /// Its name.
        name: String,
        /// Of what.
        what: What,
        /// What there is.
        amount: Amount,
        /// What others have asked for since.
        asked: u64,
    },
}

/// Why no more is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reached {
    /// A LimitRange allows no more.
    LimitRange,
    /// A ResourceQuota has no more.
    Quota,
}

impl Reached {
    /// The reason of the Event.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::LimitRange => "LimitRangeReached",
            Self::Quota => "QuotaUsedUp",
        }
    }
}

impl By {
    /// Why no more is allowed.
    #[must_use]
    pub const fn reason(&self) -> Reached {
        match self {
            Self::RangeMax { .. } | Self::RangeRatio { .. } => Reached::LimitRange,
            Self::Quota { .. } => Reached::Quota,
        }
    }
}

/// An amount for people.
fn told(measure: Measure, amount: u64) -> String {
    match measure {
        Measure::Memory => Bytes(amount).to_string(),
        Measure::Cpu => Cpu(amount).to_string(),
    }
}

const fn whose(is_of_pod: bool) -> &'static str {
    if is_of_pod { "the pod" } else { "a container" }
}

impl fmt::Display for Bound {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.by {
            By::RangeMax {
                name,
                what,
                is_of_pod,
                max,
            } => {
                let measure = what.measure();
                write!(
                    formatter,
                    "{} may be {} at most: the LimitRange `{name}` allows {} {}; raise its `max`, or lower `max` of the policy",
                    what.name(),
                    told(measure, self.most),
                    whose(*is_of_pod),
                    told(measure, *max),
                )
            }
            By::RangeRatio {
                name,
                what,
                is_of_pod,
                per_mille,
                request,
            } => {
                let measure = what.measure();
                write!(
                    formatter,
                    "{} may be {} at most: the LimitRange `{name}` allows {} a limit of {}.{:03} times its request of {}; raise the request, or its `maxLimitRequestRatio`",
                    what.name(),
                    told(measure, self.most),
                    whose(*is_of_pod),
                    per_mille / 1000,
                    per_mille % 1000,
                    told(measure, *request),
                )
            }
            By::Quota {
                name,
                what,
                amount: Amount { hard, used },
                asked,
            } => {
                let measure = what.measure();
                write!(
                    formatter,
                    "{} may be {} at most: of {} in the ResourceQuota `{name}` {} is used",
                    what.name(),
                    told(measure, self.most),
                    told(measure, *hard),
                    told(measure, *used),
                )?;
                if *asked > 0 {
                    write!(
                        formatter,
                        ", and {} asked for by others",
                        told(measure, *asked)
                    )?;
                }
                write!(
                    formatter,
                    "; raise `{}` in it, or lower limits of other pods",
                    what.name()
                )
            }
        }
    }
}
