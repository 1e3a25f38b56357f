//! After events were lost: what happened, what was done, what to change.
//!
//! In: what the source counted, and the shares' losses. Out: sentences for
//! `omirr stats`. Numbers only; nothing is looked at here.

use super::control::OverflowReport;
use crate::source::{About, SourceStats};

/// What the shares were told of losses.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Losses {
    /// Events that were lost beyond recovery, as far as they could be counted.
    pub(super) count: u64,
    /// When last, ms since 1970; 0 for never.
    pub(super) at_ms: u64,
}

pub(super) fn report(about: &About, stats: &SourceStats, losses: Losses) -> OverflowReport {
    if stats.overflows == 0 && losses.count == 0 && stats.dirs_compared == 0 && stats.lost == 0 {
        return OverflowReport::default();
    }
    let last = i64::try_from(losses.at_ms).ok().filter(|at| *at > 0);
    let last = last.and_then(|at| jiff::Timestamp::from_millisecond(at).ok());
    OverflowReport {
        count: stats.overflows.max(losses.count),
        last: last.map(|at| at.to_string()),
        happened: Some(happened(about, stats)),
        recovered_how: Some(recovered(stats, losses)),
        advice: Some(advice(about, stats)),
    }
}

fn happened(about: &About, stats: &SourceStats) -> String {
    match (about.kind, stats.overflows) {
        ("ebpf", 0) => "the kernel could not hand over every change".to_owned(),
        ("ebpf", times) => format!(
            "the kernel's buffer of {} was full {}: changes came faster than the daemon could take them",
            humanly(stats.buffer_bytes),
            counted(times, "time")
        ),
        ("fanotify", _) => "fanotify's queue was full: the kernel had no memory for more events".to_owned(),
        (kind, _) => format!("{kind} lost changes"),
    }
}

/// From what costs least to what costs most.
fn recovered(stats: &SourceStats, losses: Losses) -> String {
    let mut ways = Vec::new();
    if stats.recovered > 0 {
        ways.push(format!(
            "{} found in the kernel's map of changes",
            counted(stats.recovered, "changed inode")
        ));
    }
    if stats.dirs_compared > 0 {
        ways.push(format!(
            "{} compared with the index, because the map had no room or did not have the name",
            counted(stats.dirs_compared, "directory")
        ));
    }
    if stats.lost > 0 || losses.count > 0 {
        ways.push(
            "the share's whole tree compared with the index by stat, and what differed read".to_owned(),
        );
    }
    match ways.is_empty() {
        true => "nothing that was changed was missed".to_owned(),
        false => ways.join("; "),
    }
}

fn advice(about: &About, stats: &SourceStats) -> String {
    if about.kind != "ebpf" {
        return "none of omirr's settings helps; free memory on this host, or let omirr use ebpf".to_owned();
    }
    if stats.overflows == 0 {
        return match stats.map_capacity {
            0 => "see `omirr doctor` for a better way to attach".to_owned(),
            room => format!(
                "none of omirr's settings helps: the kernel's map has room for {} until the daemon has looked at them",
                counted(room, "changed inode")
            ),
        };
    }
    let larger = match stats.buffer_bytes {
        0 => "raise [tracer] ring_size".to_owned(),
        bytes => format!(
            "set [tracer] ring_size to {:?}",
            humanly(bytes.saturating_mul(2)).replace(' ', "")
        ),
    };
    if stats.dirs_compared == 0 && stats.lost == 0 {
        format!("{larger} if this happens often; nothing was lost, it only cost a walk of the map")
    } else if stats.lost == 0 {
        format!("{larger}: comparing costs a stat of each name in those directories")
    } else {
        format!("{larger}: comparing costs a stat of each path in the share")
    }
}

fn counted(number: u64, what: &str) -> String {
    match (number, what.strip_suffix('y')) {
        (1, _) => format!("1 {what}"),
        (_, Some(stem)) => format!("{number} {stem}ies"),
        (_, None) => format!("{number} {what}s"),
    }
}

/// As the configuration writes sizes.
fn humanly(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= 1 << 20 && bytes % (1 << 20) == 0 => format!("{} MiB", bytes >> 20),
        bytes => format!("{} KiB", bytes.div_ceil(1 << 10)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(kind: &'static str) -> About {
        About {
            kind,
            attach: None,
            transport: None,
            reason: String::new(),
        }
    }

    fn said(kind: &'static str, stats: SourceStats, count: u64) -> (String, String, String) {
        let losses = Losses { count, at_ms: 1000 };
        let report = report(&about(kind), &stats, losses);
        (
            report.happened.expect("it says what happened"),
            report.recovered_how.expect("it says how it recovered"),
            report.advice.expect("it advises"),
        )
    }

    #[test]
    fn without_a_loss_nothing_is_said() {
        let quiet = SourceStats {
            dropped: 3,
            coalesced: 9,
            ..SourceStats::default()
        };
        assert_eq!(
            report(&about("ebpf"), &quiet, Losses::default()),
            OverflowReport::default()
        );
    }

    #[test]
    fn what_the_map_has_kept_is_recovered_without_a_comparison() {
        let stats = SourceStats {
            buffer_bytes: 8 << 20,
            overflows: 2,
            recovered: 1234,
            ..SourceStats::default()
        };
        assert_eq!(
            said("ebpf", stats, 0),
            (
                "the kernel's buffer of 8 MiB was full 2 times: changes came faster than the daemon could take them"
                    .to_owned(),
                "1234 changed inodes found in the kernel's map of changes".to_owned(),
                "set [tracer] ring_size to \"16MiB\" if this happens often; nothing was lost, it only cost a walk of the map"
                    .to_owned()
            )
        );
    }

    #[test]
    fn comparisons_are_told_with_their_extent_and_cost() {
        let stats = SourceStats {
            buffer_bytes: 64 << 10,
            overflows: 1,
            recovered: 1,
            dirs_compared: 3,
            lost: 5,
            ..SourceStats::default()
        };
        let (_, recovered, advice) = said("ebpf", stats, 5);
        for part in [
            "1 changed inode found",
            "3 directories compared with the index",
            "whole tree compared",
        ] {
            assert!(recovered.contains(part), "{recovered}");
        }
        assert_eq!(
            advice,
            "set [tracer] ring_size to \"128KiB\": comparing costs a stat of each path in the share"
        );
        let full = SourceStats {
            dirs_compared: 1,
            map_capacity: 65_536,
            ..SourceStats::default()
        };
        let (happened, recovered, advice) = said("ebpf", full, 0);
        assert_eq!(happened, "the kernel could not hand over every change");
        assert!(recovered.starts_with("1 directory compared"), "{recovered}");
        assert!(
            advice.contains("the kernel's map has room for 65536 changed inodes"),
            "{advice}"
        );
        let (happened, recovered, advice) = said("fanotify", SourceStats::default(), 1);
        assert!(happened.starts_with("fanotify's queue was full"));
        assert!(recovered.starts_with("the share's whole tree compared"));
        assert!(advice.starts_with("none of omirr's settings helps"));
    }
}
