//! Memory sizes and amounts of CPU: whatever is accepted is what the text says, and is written back as the same.

use bellows_core::{Bytes, quantity};

/// A text, and its first eight bytes as a size.
pub(crate) fn text(bytes: &[u8]) {
    if let Some(chunk) = bytes.first_chunk::<8>() {
        written_back(Bytes(u64::from_le_bytes(*chunk) >> 1));
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    match quantity::parse_cpu(text) {
        Ok(cpu) => {
            assert!(cpu.0.is_multiple_of(1000), "`{text}` is whole thousandths");
            assert_eq!(quantity::parse_cpu(&cpu.to_string()), Ok(cpu));
            assert_eq!(quantity::parse_cpu_amount(text), Some(cpu));
        }
        Err(error) => assert!(error.contains(text)),
    }
    match quantity::parse(text) {
        Ok(size) => {
            written_back(size);
            assert!(is_near(size, text.trim()), "`{text}` is not {}", size.0);
            // What is shown to people.
            drop(size.to_string());
        }
        Err(error) => assert!(error.to_string().contains(text)),
    }
}

fn written_back(size: Bytes) {
    assert_eq!(quantity::parse(&quantity::format(size)), Ok(size));
}

/// Whether floating point comes to the same, within its precision and the rounding to a byte.
fn is_near(size: Bytes, text: &str) -> bool {
    const UNITS: [(&str, f64); 15] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    let (number, unit) = UNITS
        .iter()
        .find_map(|&(suffix, unit)| Some((text.strip_suffix(suffix)?, unit)))
        .unwrap_or((text, 1.0));
    let Ok(number) = number.parse::<f64>() else {
        return false;
    };
    let exact = number * unit;
    #[expect(clippy::cast_precision_loss, reason = "compared within a margin")]
    let size = size.0 as f64;
    let margin = 1e-9 * exact;
    size >= exact - margin && size <= exact + 1.0 + margin
}
