//! How far a peer's clock is from this node's.
//!
//! In: when this node asked, what the peer's clock said, when the answer came.
//! Out: the difference, and what it means for whoever runs the nodes. Nothing
//! that is replicated depends on it: the order of changes that know of one
//! another is that of their versions. Only which of two *concurrent* changes
//! counts as the newer one is decided by clocks.

/// A difference of more than so many milliseconds is worth a word.
const FAR_MS: u64 = 1000;

/// A peer's clock, as measured once (RFC 5905, section 8, with one time stamp of
/// the peer instead of two).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset {
    /// How far it is ahead of this node's, ms; below zero if it is behind.
    pub ahead_ms: i64,
    /// By how much that may be wrong, ms: half of the time until the answer came.
    pub within_ms: u64,
}

impl Offset {
    /// From three readings of clocks, ms since 1970: this node's when it asked,
    /// the peer's when it answered, this node's when the answer came.
    pub fn measured(asked_ms: u64, peer_ms: u64, answered_ms: u64) -> Offset {
        // A clock that was set back meanwhile says nothing about the way.
        let way = answered_ms.saturating_sub(asked_ms);
        let middle = asked_ms.saturating_add(way / 2);
        Offset {
            ahead_ms: signed(peer_ms).saturating_sub(signed(middle)),
            within_ms: way.div_ceil(2),
        }
    }

    /// Whether it is off by more than a second for certain.
    pub fn is_far(self) -> bool {
        self.ahead_ms.unsigned_abs().saturating_sub(self.within_ms) > FAR_MS
    }

    /// What to tell of a clock that is far off.
    pub fn sentence(self, peer: &str) -> String {
        let by = std::time::Duration::from_millis(self.ahead_ms.unsigned_abs() / 100 * 100);
        let by = humantime::format_duration(by);
        let where_to = if self.ahead_ms < 0 { "behind" } else { "ahead of" };
        format!(
            "the clock of {peer} is {by} {where_to} this node's: of two changes made at the same time the wrong one may \
             count as the newer; set both clocks by NTP (chrony, systemd-timesyncd)"
        )
    }
}

fn signed(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_there_and_back_is_no_difference() {
        let offset = Offset::measured(10_000, 10_300, 10_600);
        assert_eq!((offset.ahead_ms, offset.within_ms), (0, 300));
        assert!(!offset.is_far());
        // An answer that took long proves nothing.
        assert!(!Offset::measured(10_000, 15_000, 20_000).is_far());
        assert!(!Offset::measured(10_000, 19_900, 20_000).is_far());
    }

    #[test]
    fn a_clock_that_is_off_is_named_with_its_direction() {
        let ahead = Offset::measured(10_000, 13_750, 10_100);
        assert!(ahead.is_far());
        assert!(
            ahead
                .sentence("web2")
                .starts_with("the clock of web2 is 3s 700ms ahead of this node's")
        );
        let behind = Offset::measured(7_200_000, 3_600_000, 7_200_000);
        assert!(behind.is_far());
        assert!(
            behind
                .sentence("web2")
                .starts_with("the clock of web2 is 1h behind this node's")
        );
    }

    #[test]
    fn clocks_that_jump_and_lie_are_no_overflow() {
        for (asked, peer, answered) in [
            (u64::MAX, 0, u64::MAX),
            (0, u64::MAX, 0),
            (5, 5, 0),
            (0, 0, u64::MAX),
        ] {
            let _ = Offset::measured(asked, peer, answered).is_far();
        }
    }
}
