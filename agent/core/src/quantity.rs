//! Memory sizes as people and Kubernetes write them: `256Mi`, `1.5Gi`, `4G`, `1e9`, `1048576`.
//!
//! Kubernetes quantities (`k8s.io/apimachinery/pkg/api/resource`) allow a decimal number with a
//! binary suffix (Ki … Ei), a decimal suffix (n, u, m, none, k … E) or an exponent. Memory below
//! one byte means nothing, so a fraction of a byte is rounded up, as Kubernetes does.
//!
//! It must not accept what Kubernetes would refuse: an annotation that means one thing here and
//! another there is worse than an error.

use thiserror::Error;

use crate::units::{Bytes, Cpu};

/// Why a text is no memory size.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum QuantityError {
    /// It does not begin with a decimal number.
    #[error("`{0}` is no memory size: write a number and a unit, such as 256Mi or 4Gi")]
    NoNumber(String),
    /// What follows the number is no unit.
    #[error(
        "`{text}` has the unknown unit `{unit}`: use Ki, Mi, Gi, Ti (powers of 1024), k, M, G, T (powers of 1000), or none for bytes"
    )]
    UnknownUnit {
        /// The whole text.
        text: String,
        /// What was read as its unit.
        unit: String,
    },
    /// It does not fit 63 bits.
    #[error("`{0}` is too large: the largest memory size is below 8Ei")]
    TooLarge(String),
}

/// A unit as a fraction, so that `m` and `Gi` are treated alike.
fn unit(suffix: &str) -> Option<(u128, u128)> {
    let fraction = match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => return exponent(suffix),
    };
    Some(fraction)
}

/// `e9`, `E+3`, `e-1`.
fn exponent(suffix: &str) -> Option<(u128, u128)> {
    let digits = suffix.strip_prefix(['e', 'E'])?;
    let power: i32 = digits.parse().ok()?;
    let scale = 10_u128.checked_pow(power.unsigned_abs())?;
    Some(if power < 0 { (1, scale) } else { (scale, 1) })
}

/// Parses an amount of CPU: `250m`, `1.5`, `2`.
///
/// # Errors
///
/// A text that says what to write instead. Kubernetes allows nothing finer than a thousandth
/// (`ValidateResourceQuantityValue` of cpu), so that is refused too.
pub fn parse_cpu(text: &str) -> Result<Cpu, String> {
    let trimmed = text.trim();
    let end = trimmed
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(trimmed.len());
    let (number, suffix) = trimmed.split_at(end);
    let unit = match suffix {
        "" => Some((1000, 1)),
        "m" => Some((1, 1)),
        other => exponent(other).and_then(|(up, down)| Some((up.checked_mul(1000)?, down))),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.chars().all(|c| c.is_ascii_digit());
    let is_number = digits(whole) && digits(fraction) && !(whole.is_empty() && fraction.is_empty());
    // Thousandths of thousandths: none may be left.
    let scaled = unit.and_then(|(up, down)| scale(whole, fraction, up.checked_mul(1000)?, down));
    let millionths = scaled.filter(|_| is_number);
    match millionths.and_then(|millionths| u64::try_from(millionths).ok()) {
        Some(millionths) if millionths % 1000 == 0 && millionths <= LARGEST_CPU => {
            Ok(Cpu(millionths))
        }
        _ => Err(format!(
            "`{text}` is no amount of CPU: write CPUs or thousandths, such as 2 or 250m"
        )),
    }
}

/// Parses what a quota, a LimitRange or a pod that the API has taken says of CPU; `None` for what is no amount.
///
/// The API prints amounts with the largest unit that fits (`CanonicalizeBytes`, apimachinery's pkg/api/resource/amount.go):
/// 1,000 CPUs are `1k`. And nothing keeps a quota from being finer than a thousandth, or larger than any node. So every unit
/// is known here; what does not fit is the largest amount, which is less than it says.
///
/// Who writes a policy means neither: [`parse_cpu`] refuses it.
#[must_use]
pub fn parse_cpu_amount(text: &str) -> Option<Cpu> {
    let (whole, fraction, suffix) = parts(text)?;
    let (up, down) = unit(suffix)?;
    let millionths = up
        .checked_mul(1_000_000)
        .and_then(|up| scale(whole, fraction, up, down));
    match millionths {
        Some(millionths) => Some(Cpu(u64::try_from(millionths).unwrap_or(u64::MAX))),
        // Many digits behind the point are not many CPUs.
        None => (fraction.is_empty() && down == 1).then_some(Cpu(u64::MAX)),
    }
}

/// A million CPUs.
const LARGEST_CPU: u64 = 1_000_000_000_000;

/// Digits before the point, digits behind it, and the unit; `None` where there is no number.
fn parts(text: &str) -> Option<(&str, &str, &str)> {
    let trimmed = text.trim();
    let end = trimmed
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(trimmed.len());
    let (number, suffix) = trimmed.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let is_none = fraction.contains('.') || (whole.is_empty() && fraction.is_empty());
    (!is_none).then_some((whole, fraction, suffix))
}

/// Parses a memory size.
///
/// # Errors
///
/// [`QuantityError`] names the text, what is wrong with it, and what to write instead. Negative
/// sizes are refused.
pub fn parse(text: &str) -> Result<Bytes, QuantityError> {
    let no_number = || QuantityError::NoNumber(text.to_owned());
    let (whole, fraction, suffix) = parts(text).ok_or_else(no_number)?;
    let unknown = || QuantityError::UnknownUnit {
        text: text.to_owned(),
        unit: suffix.to_owned(),
    };
    let (numerator, denominator) = unit(suffix).ok_or_else(unknown)?;
    let bytes = scale(whole, fraction, numerator, denominator);
    bytes
        .and_then(|bytes| u64::try_from(bytes).ok())
        .filter(|&bytes| i64::try_from(bytes).is_ok())
        .map(Bytes)
        .ok_or_else(|| QuantityError::TooLarge(text.to_owned()))
}

/// `whole.fraction * numerator / denominator`, rounded up; `None` when it does not fit.
fn scale(whole: &str, fraction: &str, numerator: u128, denominator: u128) -> Option<u128> {
    let digits = [whole, fraction].concat();
    let mantissa: u128 = if digits.is_empty() {
        0
    } else {
        digits.parse().ok()?
    };
    let places = u32::try_from(fraction.len()).ok()?;
    let divisor = denominator.checked_mul(10_u128.checked_pow(places)?)?;
    Some(mantissa.checked_mul(numerator)?.div_ceil(divisor))
}

/// The canonical text of a size for a pod: the largest binary unit that divides it.
#[must_use]
pub fn format(bytes: Bytes) -> String {
    for (shift, suffix) in [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")] {
        let one = 1_u64 << shift;
        if bytes.0 != 0 && bytes.0.is_multiple_of(one) {
            return format!("{}{suffix}", bytes.0 >> shift);
        }
    }
    bytes.0.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_of_cpu() {
        for (text, millis) in [
            ("2", 2000),
            ("250m", 250),
            ("1e-1", 100),
            ("100e-3", 100),
            ("1e1", 10_000),
            (" 1.5 ", 1500),
            ("0.001", 1),
            (".5", 500),
            ("1.", 1000),
        ] {
            assert_eq!(parse_cpu(text), Ok(Cpu::millis(millis)), "{text}");
        }
        for text in [
            "",
            "m",
            ".",
            "-1",
            "+1",
            "1e7",
            "1e-4",
            "1e",
            "0.5m",
            "0.0001",
            "1k",
            "1 m",
            "2Mi",
            "99999999999999999999999",
        ] {
            assert!(parse_cpu(text).is_err(), "{text}");
        }
    }

    #[test]
    fn amounts_of_cpu_as_the_api_prints_them() {
        let largest = u64::MAX;
        for (text, millionths) in [
            ("1k", 1_000_000_000),
            ("2500", 2_500_000_000),
            ("1M", 1_000_000_000_000),
            ("2G", 2_000_000_000_000_000),
            ("9T", 9_000_000_000_000_000_000),
            ("1P", 1_000_000_000_000_000_000_000_u128),
            ("250m", 250_000),
            ("1500u", 1500),
            ("1n", 1),
            ("1.5", 1_500_000),
            ("1e3", 1_000_000_000),
            ("1Ki", 1_024_000_000),
            ("0", 0),
            ("9223372036854775807", u128::MAX),
            ("9E", u128::MAX),
            ("99999999999999999999999999999999999999999", u128::MAX),
        ] {
            let expected = u64::try_from(millionths).unwrap_or(largest);
            assert_eq!(parse_cpu_amount(text), Some(Cpu(expected)), "{text}");
        }
        let many = format!("0.{}1", "0".repeat(50));
        for text in ["", "k", ".", "-1", "1 k", "1kk", "1.2.3", "1e", &many] {
            assert_eq!(parse_cpu_amount(text), None, "{text}");
        }
    }

    #[test]
    fn reads_what_kubernetes_reads() {
        let cases = [
            ("0", 0),
            ("128974848", 128_974_848),
            ("129e6", 129_000_000),
            ("129M", 129_000_000),
            ("123Mi", 123 << 20),
            ("1.5Gi", 3 << 29),
            (".5Ki", 512),
            ("5.Ki", 5 << 10),
            ("1500m", 2),
            ("1E", 1_000_000_000_000_000_000),
            ("1E3", 1000),
            (" 4Gi ", 4 << 30),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse(text), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn refuses_with_the_value_named() {
        for text in [
            "",
            "Mi",
            "-1Mi",
            "1.2.3",
            "4GB",
            "4 Gi",
            "4gi",
            "1e",
            "9Ei",
            "99999999999999999999",
            "1e999",
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.to_string().contains(&format!("`{text}`")), "{error}");
        }
    }

    #[test]
    fn formats_canonically() {
        for (bytes, text) in [
            (0, "0"),
            (1 << 30, "1Gi"),
            (3 << 29, "1536Mi"),
            (1000, "1000"),
            (2048, "2Ki"),
        ] {
            assert_eq!(format(Bytes(bytes)), text);
            assert_eq!(parse(text), Ok(Bytes(bytes)));
        }
    }
}
