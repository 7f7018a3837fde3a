//! What a file of policies says of memory requests.

use bellows_core::{Nanos, requests::RequestRules};
use serde::Deserialize;
use serde_saphyr::Spanned;

use super::{Problem, duration, problem, size};

/// What a request keeps beyond what is used, where a policy says nothing. Thousandths.
const MARGIN: u64 = 250;
/// For how long a container is watched before it is right-sized, where a policy says nothing.
const OBSERVE: Nanos = Nanos::millis(3_600_000);
/// Percent. More is a wrong word, such as one meant for bytes.
const LARGEST_MARGIN: u64 = 400;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Requests {
    #[serde(default)]
    right_size: bool,
    #[serde(default)]
    make_room: bool,
    floor: Spanned<String>,
    margin: Option<Spanned<String>>,
    observe: Option<Spanned<String>>,
}

impl Requests {
    pub(super) fn checked(&self) -> Result<RequestRules, Problem> {
        let floor = size(&self.floor)?;
        if !self.right_size && !self.make_room {
            let what =
                "neither rightSize nor makeRoom is true: write one of them, or leave out requests";
            return Err(problem(self.floor.referenced, what.to_owned()));
        }
        Ok(RequestRules {
            right_size: self.right_size,
            make_room: self.make_room,
            floor,
            margin_per_mille: self.margin.as_ref().map_or(Ok(MARGIN), margin)?,
            observe: self.observe.as_ref().map_or(Ok(OBSERVE), duration)?,
        })
    }
}

/// Percent, in thousandths.
fn margin(text: &Spanned<String>) -> Result<u64, Problem> {
    let percent = text.value.strip_suffix('%');
    let percent = percent.and_then(|percent| percent.parse::<u64>().ok());
    let percent = percent.filter(|&percent| percent <= LARGEST_MARGIN);
    percent.map(|percent| percent * 10).ok_or_else(|| {
        let what = format!(
            "`{}` is no margin: write whole percent of 0% to {LARGEST_MARGIN}%, such as 25%",
            text.value
        );
        problem(text.referenced, what)
    })
}

/// For people.
pub(super) fn told(rules: &RequestRules) -> String {
    let when = match (rules.right_size, rules.make_room) {
        (true, true) => "down to what is used, and for pods of higher priority",
        (true, false) => "down to what is used",
        _ => "down for pods of higher priority",
    };
    format!("request {when}, {} at least", rules.floor)
}
