//! What an answer of the API means: whether it is certain, and whether it will pass.

use std::io;

use kube::core::{Status, response::StatusSummary};

use super::RESIZE_TIMEOUT;
use crate::{
    guard::Refused,
    metrics::{self, Call, METRICS},
};

/// The code of an answer, as it is meant. An API server that has just started forbids what its admission cannot judge yet
/// (403, "not yet ready to handle request": `Lifecycle.Admit`, k8s.io/apiserver/pkg/admission/plugin/namespace/lifecycle, and
/// a dozen others; 1.37), and means 503: a burst would be let go at its limit for what passes in a second.
pub(crate) fn code_of(status: &Status) -> u16 {
    let is_starting = status.message.contains("not yet ready to handle request");
    if status.code == 403 && is_starting {
        503
    } else {
        status.code
    }
}

/// Whether what was asked for may still come.
pub(crate) fn is_uncertain<T, E>(ended: &Result<Result<T, kube::Error>, E>) -> bool {
    match ended {
        Ok(Ok(_)) => false,
        Ok(Err(error)) => refusal(error).0.uncertain,
        Err(_elapsed) => true,
    }
}

/// Counts a resize that ended so.
pub(in crate::actuate) fn counted<T, E>(ended: &Result<Result<T, kube::Error>, E>) {
    count(match ended {
        Ok(Ok(_)) => metrics::OK,
        Ok(Err(error)) if !refusal(error).0.uncertain => metrics::REFUSED,
        _ => metrics::SILENT,
    });
}

fn count(result: &'static str) {
    let counted = Call {
        call: "resize",
        result,
    };
    METRICS.api_calls.get_or_create(&counted).inc();
}

/// What an error of the client means: an answer of the API is definite, anything else may have
/// reached it.
pub(super) fn refusal(error: &kube::Error) -> (Refused, Option<u16>) {
    let code = match error {
        kube::Error::Api(status) => Some(code_of(status)),
        _ => None,
    };
    let uncertain = code.is_none_or(|code| code >= 500 && code != 503) && !was_not_sent(error);
    // A conflict, too many requests, or unavailable.
    let is_busy = code.is_none_or(|code| [409, 429, 503].contains(&code));
    (
        Refused {
            why: error.to_string(),
            uncertain,
            is_passing: uncertain || is_busy,
        },
        code,
    )
}

pub(super) fn silent() -> Refused {
    Refused {
        why: format!("no answer within {} s", RESIZE_TIMEOUT.as_secs()),
        uncertain: true,
        is_passing: true,
    }
}

/// What is not asked of the API before what the limit was is on the pod: a moment, unless something there refuses that.
pub(super) fn unrecorded() -> Refused {
    Refused {
        why: "not asked for before what somebody else has set is recorded on the pod".to_owned(),
        uncertain: false,
        is_passing: true,
    }
}

/// What is not asked of the API while a memory limit of the pod is raised on the node and the API may not or cannot say so.
/// It passes with the burst.
pub(super) fn only_by_hand() -> kube::Error {
    kube::Error::Api(Box::new(Status {
        status: Some(StatusSummary::Failure),
        code: 409,
        message: "not asked for while a memory limit of the pod is raised on the node alone: the kubelet would lower it"
            .to_owned(),
        ..Status::default()
    }))
}

/// Whether nothing can have reached the API: there was no connection.
fn was_not_sent(error: &kube::Error) -> bool {
    let error: &(dyn std::error::Error + 'static) = error;
    let mut chain = std::iter::successors(Some(error), |error| error.source());
    chain.any(|error| {
        error.downcast_ref::<io::Error>().is_some_and(|error| {
            matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkUnreachable
                    | io::ErrorKind::AddrNotAvailable
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_sent_is_certain() {
        let of = |kind| {
            let refused: Box<dyn std::error::Error + Send + Sync> = Box::new(io::Error::from(kind));
            refusal(&kube::Error::Service(refused)).0
        };
        let refused = of(io::ErrorKind::ConnectionRefused);
        assert!(!refused.uncertain && refused.is_passing);
        let broken = of(io::ErrorKind::BrokenPipe);
        assert!(broken.uncertain && broken.is_passing);
        let status = |code| {
            let status = Status {
                code,
                ..Status::default()
            };
            let refused = refusal(&kube::Error::Api(Box::new(status))).0;
            (refused.uncertain, refused.is_passing)
        };
        for code in [409, 429, 503] {
            assert_eq!(status(code), (false, true), "{code}");
        }
        for code in [500, 504] {
            assert_eq!(status(code), (true, true), "{code}");
        }
        for code in [400, 403, 404, 422] {
            assert_eq!(status(code), (false, false), "{code}");
        }
    }

    #[test]
    fn who_has_just_started_forbids_nothing() {
        let refused = |message: &str| {
            let status = Status {
                code: 403,
                message: message.to_owned(),
                ..Status::default()
            };
            let refused = refusal(&kube::Error::Api(Box::new(status))).0;
            (refused.uncertain, refused.is_passing)
        };
        let starting = "pods \"a\" is forbidden: not yet ready to handle request";
        assert_eq!(refused(starting), (false, true));
        assert_eq!(
            refused("pods \"a\" is forbidden: exceeded quota: b"),
            (false, false)
        );
    }
}
