//! `bellows doctor`: what works on this machine, what is lost where something does not, what to do.
//!
//! Every check looks at the thing itself (a file is read, a program attached, memory touched under the
//! growth hook) and never at a version number: distributions backport and configure. A check that
//! cannot be made says why instead of passing.
//!
//! It must change nothing that outlives it: the one cgroup that it makes is removed again.

mod brake;
pub mod hooks;
mod machine;
pub(crate) use machine::swap_devices;
pub mod touch;

use std::fmt;

use serde::Serialize;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Works,
    /// Bellows works, with less.
    Limited,
    /// Bellows cannot work.
    Missing,
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How it ended.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What is lost by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost: Option<&'static str>,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<&'static str>,
}

impl Finding {
    fn works(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            check,
            verdict: Verdict::Works,
            found: found.into(),
            lost: None,
            remedy: None,
        }
    }

    fn limited(
        check: &'static str,
        found: impl Into<String>,
        lost: &'static str,
        remedy: &'static str,
    ) -> Self {
        Self {
            check,
            verdict: Verdict::Limited,
            found: found.into(),
            lost: Some(lost),
            remedy: Some(remedy),
        }
    }

    fn missing(
        check: &'static str,
        found: impl Into<String>,
        lost: &'static str,
        remedy: &'static str,
    ) -> Self {
        Self {
            verdict: Verdict::Missing,
            ..Self::limited(check, found, lost, remedy)
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.verdict {
            Verdict::Works => "ok     ",
            Verdict::Limited => "limited",
            Verdict::Missing => "MISSING",
        };
        write!(formatter, "{mark}  {:<22} {}", self.check, self.found)?;
        for (word, text) in [("lost", self.lost), ("do", self.remedy)] {
            if let Some(text) = text {
                write!(formatter, "\n{word:>12}: {text}")?;
            }
        }
        Ok(())
    }
}

/// Everything that was found, and the worst of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The worst verdict.
    pub verdict: Verdict,
    /// In the order in which Bellows needs them.
    pub findings: Vec<Finding>,
}

/// Makes every check.
#[must_use]
pub fn examine() -> Report {
    let mut findings = machine::findings();
    findings.push(brake::finding());
    findings.extend(hooks::findings());
    let worst = findings.iter().map(|finding| finding.verdict).max();
    Report {
        verdict: worst.unwrap_or(Verdict::Missing),
        findings,
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(formatter, "{finding}")?;
        }
        let text = match self.verdict {
            Verdict::Works => "Bellows works here.",
            Verdict::Limited => "Bellows works here, with what is named above lost.",
            Verdict::Missing => "Bellows cannot work here until what is MISSING is there.",
        };
        writeln!(formatter, "\n{text}")
    }
}
