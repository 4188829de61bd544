//! Owns: durations and sizes as people write them.
//! Does not own: which limits a key has (`config`). Pure.

use std::time::Duration;

use bytesize::ByteSize;
use jiff::SpanRelativeTo;
use jiff::fmt::friendly::SpanParser;

/// What a duration looks like, for messages.
pub const DURATION_EXAMPLE: &str = "a duration such as \"500ms\", \"5s\", \"10min\", \"2h\" or \"14d\"";
/// What a size looks like, for messages.
pub const SIZE_EXAMPLE: &str = "a size such as \"32MiB\" or \"64GiB\"";

/// The units we take: jiff knows more, and some of them (`m`, months) are easily mistaken.
const DURATION_UNITS: [&str; 5] = ["ms", "s", "min", "h", "d"];
/// bytesize would also take a bare number, or `k`: strict here, so that nobody gets 32 bytes of memory.
const SIZE_UNITS: [&str; 9] = ["B", "KiB", "MiB", "GiB", "TiB", "kB", "MB", "GB", "TB"];

/// `5s`, `1h30min`: whole numbers with a unit each; a day is 24 hours.
pub fn parse_duration(text: &str) -> Option<Duration> {
    if !only_these_units(text, &DURATION_UNITS) {
        return None;
    }
    let span = SpanParser::new().parse_span(text).ok()?;
    span.to_duration(SpanRelativeTo::days_are_24_hours()).ok()?.try_into().ok()
}

/// `64GiB` (binary) or `64GB` (decimal), in bytes.
pub fn parse_size(text: &str) -> Option<u64> {
    let one = text.bytes().filter(u8::is_ascii_alphabetic).count() == text.trim_start_matches(is_digit).len();
    if !one || !only_these_units(text, &SIZE_UNITS) {
        return None;
    }
    let number: u64 = text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).parse().ok()?;
    let bytes = text.parse::<ByteSize>().ok()?.as_u64();
    // bytesize calculates in floating point: what is not exact, or does not fit, is not a size we want.
    (number == 0 || (bytes != u64::MAX && bytes.is_multiple_of(number))).then_some(bytes)
}

/// The shortest text that [`parse_duration`] reads back; parts of a millisecond are dropped.
pub fn show_duration(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1000, "s")];
    let whole = units.into_iter().find(|(unit, _)| milliseconds >= *unit && milliseconds.is_multiple_of(*unit));
    let (unit, name) = whole.unwrap_or(if milliseconds == 0 { (1, "s") } else { (1, "ms") });
    format!("{}{name}", milliseconds / unit)
}

/// The shortest text that [`parse_size`] reads back.
pub fn show_size(bytes: u64) -> String {
    let units = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let whole = units.into_iter().find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit));
    let (unit, name) = whole.unwrap_or((1, "B"));
    format!("{}{name}", bytes / unit)
}

fn is_digit(c: char) -> bool {
    c.is_ascii_digit()
}

/// One or more of: digits, then one of `units`. Nothing else: no signs, fractions, blanks or words.
fn only_these_units(text: &str, units: &[&str]) -> bool {
    let mut rest = text;
    while !rest.is_empty() {
        let after_digits = rest.trim_start_matches(is_digit);
        let end = after_digits.find(is_digit).unwrap_or(after_digits.len());
        if after_digits.len() == rest.len() || !units.contains(&&after_digits[..end]) {
            return false;
        }
        rest = &after_digits[end..];
    }
    !text.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit() {
        for (text, milliseconds) in [
            ("500ms", 500),
            ("5s", 5_000),
            ("10min", 600_000),
            ("2h", 7_200_000),
            ("14d", 14 * 86_400_000),
            ("1h30min", 5_400_000),
            ("0s", 0),
        ] {
            assert_eq!(parse_duration(text), Some(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in
            ["", "5", "s", "5 s", "-5s", "5m", "5 minutes", "1.5h", "5s ago", "1y", "5S", "٥s", "99999999999999999999d"]
        {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_need_a_unit() {
        for (text, bytes) in [
            ("10MiB", 10 << 20),
            ("64GiB", 64 << 30),
            ("1TiB", 1 << 40),
            ("1kB", 1000),
            ("5GB", 5_000_000_000),
            ("7B", 7),
            ("0B", 0),
        ] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for text in ["", "10", "MiB", "10M", "10 MiB", "-1B", "1.5GiB", "10mib", "1GiB2MiB", "99999999999TiB"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn shown_values_read_back() {
        for milliseconds in [0, 1, 999, 1000, 1500, 60_000, 90_000, 3_600_000, 86_400_000] {
            let duration = Duration::from_millis(milliseconds);
            assert_eq!(parse_duration(&show_duration(duration)), Some(duration));
        }
        assert_eq!(show_duration(Duration::from_secs(600)), "10min");
        for bytes in [0, 1, 1000, 1024, 8 << 20, 3 << 40, (1 << 30) + 1] {
            assert_eq!(parse_size(&show_size(bytes)), Some(bytes));
        }
        assert_eq!(show_size(32 << 20), "32MiB");
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,12}") {
            let _ = (parse_duration(&text), parse_size(&text));
        }
    }
}
