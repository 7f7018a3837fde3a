//! What a file of policies says of heaps.

use bellows_core::{Bytes, heap::Heap, quantity};
use serde_saphyr::Spanned;

use super::{Problem, problem, size};

/// A JVM does not start on less.
const LEAST: Bytes = Bytes::mib(16);

/// `Original`, `Maximum` or a size that is not above the policy's maximum: a heap that outgrows every limit is a kill.
pub(super) fn checked(text: &Spanned<String>, max: Bytes) -> Result<Heap, Problem> {
    let wrong = |what: String| Err(problem(text.referenced, what));
    match text.value.as_str() {
        "Original" => return Ok(Heap::Original),
        "Maximum" => return Ok(Heap::Maximum),
        other if quantity::parse(other).is_err() => {
            return wrong(format!(
                "`{other}` is no heap's limit: write Original, Maximum or a size such as 1Gi"
            ));
        }
        _ => {}
    }
    let heap = size(text)?;
    if heap > max {
        return wrong(format!(
            "heap is {heap}, above max, which is {max}: write Maximum, or raise max"
        ));
    }
    if heap < LEAST {
        return wrong(format!("{heap} is too small for a heap: use at least 16Mi"));
    }
    Ok(Heap::At(heap))
}

/// For people.
pub(super) fn told(heap: Heap) -> String {
    match heap {
        Heap::Original => ", heaps by its own limit".to_owned(),
        Heap::Maximum => ", heaps by the maximum".to_owned(),
        Heap::At(bytes) => format!(", heaps by {bytes}"),
    }
}
