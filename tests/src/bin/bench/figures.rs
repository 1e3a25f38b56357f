//! What is said of many measurements of one thing.
//!
//! In: numbers. Out: median, percentiles, the least and the most, and how
//! numbers are written.

/// Of at least one number.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// In order.
    values: Vec<f64>,
}

impl Figures {
    /// None without numbers.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Figures> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        (!values.is_empty()).then_some(Figures { values })
    }

    pub fn count(&self) -> usize {
        self.values.len()
    }

    pub fn least(&self) -> f64 {
        self.values[0]
    }

    pub fn most(&self) -> f64 {
        self.values[self.values.len() - 1]
    }

    /// Of an even number of values, the mean of the two in the middle.
    pub fn median(&self) -> f64 {
        let middle = self.values.len() / 2;
        if self.values.len().is_multiple_of(2) {
            f64::midpoint(self.values[middle - 1], self.values[middle])
        } else {
            self.values[middle]
        }
    }

    /// The smallest value that so much of a hundred are not above.
    pub fn percentile(&self, of_a_hundred: f64) -> f64 {
        let rank = (of_a_hundred / 100.0 * self.values.len() as f64).ceil() as usize;
        self.values[rank.clamp(1, self.values.len()) - 1]
    }

    pub fn sorted(&self) -> &[f64] {
        &self.values
    }
}

/// What a number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Milliseconds,
    Seconds,
    Microseconds,
    Megabytes,
    Bytes,
}

impl Unit {
    pub fn name(self) -> &'static str {
        match self {
            Unit::Milliseconds => "ms",
            Unit::Seconds => "s",
            Unit::Microseconds => "µs",
            Unit::Megabytes => "MB",
            Unit::Bytes => "bytes",
        }
    }

    /// With its unit.
    pub fn write(self, value: f64) -> String {
        format!("{} {}", number(value), self.name())
    }
}

/// Three digits that count, and no more.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if size >= 99.95 {
        format!("{value:.0}")
    } else if size >= 9.995 {
        format!("{value:.1}")
    } else if size >= 0.9995 {
        format!("{value:.2}")
    } else if size >= 0.0005 {
        format!("{value:.3}")
    } else if size > 0.0 {
        format!("{value:.5}")
    } else {
        "0".to_owned()
    }
}

/// `100000` as `100,000`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_one_or_between_two() {
        let of = |values: &[f64]| Figures::of(values.iter().copied()).unwrap().median();
        assert_eq!(of(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(of(&[7.0]), 7.0);
        assert!(Figures::of([]).is_none());
        assert!(Figures::of([f64::NAN]).is_none());
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let hundred = Figures::of((1..=100).map(f64::from)).unwrap();
        assert_eq!(hundred.percentile(99.0), 99.0);
        assert_eq!(hundred.percentile(50.0), 50.0);
        let few = Figures::of([1.0, 2.0, 3.0]).unwrap();
        assert_eq!(few.percentile(99.0), 3.0);
        assert_eq!(few.percentile(1.0), 1.0);
    }

    #[test]
    fn numbers_have_three_digits_that_count() {
        let written: Vec<String> = [0.0, 0.00012, 0.5, 1.234, 12.34, 123.4, 12345.6]
            .into_iter()
            .map(number)
            .collect();
        assert_eq!(written, ["0", "0.00012", "0.500", "1.23", "12.3", "123", "12346"]);
        assert_eq!(count(1_000_000), "1,000,000");
        assert_eq!(count(999), "999");
    }
}
