//! `omirr stats`: what the tracer counts, and what to do after an overflow.

mod metrics;

use std::{
    fmt::Write,
    io::{self, Write as _},
};

use clap::Args;

use super::{
    ask::{self, ReportArgs},
    status::{render_source, uptime},
    terminal::{Paint, Table, Tone, bytes, number, plain},
};
use crate::daemon::control::{OverflowReport, Request, StatsReport};

/// Show the tracer's figures: events, drops, buffers, hooks, overflow diagnosis
#[derive(Clone, Debug, Args)]
pub(super) struct StatsArgs {
    #[command(flatten)]
    report: ReportArgs,
    /// Print them in the text format of OpenMetrics, for Prometheus and others
    #[arg(long, conflicts_with_all = ["json", "watch"])]
    metrics: bool,
}

pub(super) fn run(args: &StatsArgs) -> anyhow::Result<()> {
    if args.metrics {
        let stats = ask::once(&args.report.config, &Request::Stats)?;
        return Ok(io::stdout().write_all(metrics::text(&stats)?.as_bytes())?);
    }
    ask::print(&args.report, &Request::Stats, render)
}

fn render(stats: &StatsReport, paint: Paint, out: &mut String) {
    if let Some(source) = &stats.source {
        render_source(source, out);
    }
    let _ = writeln!(
        out,
        "events: {} in {}, {} dropped",
        number(stats.events),
        uptime(stats.uptime_s),
        paint.word(bad_unless_zero(stats.dropped), &number(stats.dropped))
    );
    if stats.buffer_bytes > 0 {
        let percent = u128::from(stats.high_water_bytes) * 100 / u128::from(stats.buffer_bytes);
        let _ = writeln!(
            out,
            "buffer: {}, at most {percent} % full ({})",
            bytes(stats.buffer_bytes),
            bytes(stats.high_water_bytes)
        );
    }
    render_map(stats, out);
    let resolver = &stats.resolver;
    let _ = writeln!(
        out,
        "resolver: {} hits, {} misses, {} fallbacks",
        number(resolver.hits),
        number(resolver.misses),
        number(resolver.fallbacks)
    );
    if let (Some(p50), Some(p99)) = (stats.event_to_row_ms.p50, stats.event_to_row_ms.p99) {
        let _ = writeln!(
            out,
            "from event to row: {p50:.1} ms at the median, {p99:.1} ms at 99 %"
        );
    }
    render_overflow(&stats.overflow, paint, out);
    if !stats.per_cpu.is_empty() {
        out.push('\n');
        let mut cpus = Table::new(&["CPU", "SUBMITTED", "COALESCED", "DROPPED"]);
        for cpu in &stats.per_cpu {
            cpus.row(vec![
                (Tone::Plain, cpu.cpu.to_string()),
                (Tone::Plain, number(cpu.submitted)),
                (Tone::Plain, number(cpu.coalesced)),
                (bad_unless_zero(cpu.dropped), number(cpu.dropped)),
            ]);
        }
        cpus.render(0, paint, out);
    }
    if !stats.hooks.is_empty() {
        out.push('\n');
        let mut hooks = Table::new(&["HOOK", "ATTACHED", "HITS", "NOTE"]);
        for hook in &stats.hooks {
            let attached = if hook.attached {
                (Tone::Good, "yes")
            } else {
                (Tone::Busy, "no")
            };
            hooks.row(vec![
                (Tone::Plain, hook.hook.clone()),
                (attached.0, attached.1.to_owned()),
                (Tone::Plain, number(hook.hits)),
                (Tone::Plain, hook.note.clone().unwrap_or_else(|| "-".to_owned())),
            ]);
        }
        hooks.render(0, paint, out);
    }
}

/// The kernel's map of changes, where there is one.
fn render_map(stats: &StatsReport, out: &mut String) {
    if stats.map_capacity == 0 {
        return;
    }
    let percent = u128::from(stats.map_entries) * 100 / u128::from(stats.map_capacity);
    let _ = writeln!(
        out,
        "map of changes: {} of {} entries ({percent} %), {} changes merged into one that was waiting",
        number(stats.map_entries),
        number(stats.map_capacity),
        number(stats.coalesced)
    );
    if stats.taken_over > 0 {
        let _ = writeln!(
            out,
            "taken over: {} changes were waiting when the daemon started",
            number(stats.taken_over)
        );
    }
}

fn render_overflow(overflow: &OverflowReport, paint: Paint, out: &mut String) {
    if overflow.count == 0 {
        out.push_str("overflow: none\n");
        return;
    }
    let count = paint.word(Tone::Bad, &number(overflow.count));
    let times = if overflow.count == 1 { "time" } else { "times" };
    let last = overflow
        .last
        .as_deref()
        .map(|at| format!(", last at {}", plain(at)))
        .unwrap_or_default();
    let _ = writeln!(out, "overflow: {count} {times}{last}");
    for (what, text) in [
        ("what happened:", &overflow.happened),
        ("recovered by", &overflow.recovered_how),
        ("advice:", &overflow.advice),
    ] {
        if let Some(text) = text {
            let _ = writeln!(out, "  {what} {}", plain(text));
        }
    }
}

fn bad_unless_zero(count: u64) -> Tone {
    if count == 0 { Tone::Plain } else { Tone::Bad }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::control::{CpuReport, HookReport, Percentiles, ResolverReport};

    #[test]
    fn an_overflow_comes_with_its_remedy() {
        let stats = StatsReport {
            uptime_s: 60,
            events: 1_000_000,
            dropped: 12,
            buffer_bytes: 8 << 20,
            high_water_bytes: 4 << 20,
            per_cpu: vec![CpuReport {
                cpu: 0,
                submitted: 5,
                dropped: 12,
                coalesced: 4321,
            }],
            hooks: vec![HookReport {
                hook: "vfs_fallocate".into(),
                attached: false,
                note: Some("absent here".into()),
                hits: 0,
            }],
            resolver: ResolverReport {
                hits: 9,
                misses: 1,
                fallbacks: 1,
            },
            event_to_row_ms: Percentiles {
                p50: Some(0.44),
                p99: Some(3.0),
            },
            overflow: OverflowReport {
                count: 1,
                last: Some("2026-01-02T03:04:05Z".into()),
                happened: Some("the ring was full".into()),
                recovered_how: Some("a rescan of 3 directories".into()),
                advice: Some("raise ring_size in [tracer]".into()),
            },
            coalesced: 5000,
            map_entries: 16_384,
            map_capacity: 65_536,
            taken_over: 17,
            ..StatsReport::default()
        };
        let mut out = String::new();
        render(&stats, Paint { on: false }, &mut out);
        assert_eq!(
            out,
            "\
events: 1,000,000 in 1m, 12 dropped
buffer: 8.0 MiB, at most 50 % full (4.0 MiB)
map of changes: 16,384 of 65,536 entries (25 %), 5,000 changes merged into one that was waiting
taken over: 17 changes were waiting when the daemon started
resolver: 9 hits, 1 misses, 1 fallbacks
from event to row: 0.4 ms at the median, 3.0 ms at 99 %
overflow: 1 time, last at 2026-01-02T03:04:05Z
  what happened: the ring was full
  recovered by a rescan of 3 directories
  advice: raise ring_size in [tracer]

CPU  SUBMITTED  COALESCED  DROPPED
0    5          4,321      12

HOOK           ATTACHED  HITS  NOTE
vfs_fallocate  no        0     absent here
"
        );
    }

    #[test]
    fn a_source_without_a_buffer_shows_none() {
        let mut out = String::new();
        render(&StatsReport::default(), Paint { on: false }, &mut out);
        assert_eq!(
            out,
            "events: 0 in 0s, 0 dropped\nresolver: 0 hits, 0 misses, 0 fallbacks\noverflow: none\n"
        );
    }
}
