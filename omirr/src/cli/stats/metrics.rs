//! The figures of `omirr stats` for programs that collect them, in the text
//! format of OpenMetrics, which Prometheus and others read.
//!
//! In: the daemon's answer. Out: text. Names are promised: scripts and boards
//! use them. What counts up since the daemon's start is a counter, what is so
//! now is a gauge.

use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};

use crate::daemon::control::StatsReport;

type Labels = Vec<(String, String)>;

/// One figure for each of several things.
type Each<'a> = &'a mut dyn Iterator<Item = (Labels, u64)>;

pub(super) fn text(stats: &StatsReport) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("omirr");
    if let Some(source) = &stats.source {
        let how = [("attach", &source.attach), ("transport", &source.transport)];
        let labels = [label("kind", &source.kind)]
            .into_iter()
            .chain(how.map(|(name, value)| label(name, value.as_deref().unwrap_or(""))));
        registry.register(
            "source",
            "Which event source runs",
            Info::new(labels.collect::<Labels>()),
        );
    }
    source(stats, &mut registry);
    for (name, help, value) in [
        (
            "resolver_hits",
            "Changes whose path was known",
            stats.resolver.hits,
        ),
        (
            "resolver_misses",
            "Changes whose directory was not known",
            stats.resolver.misses,
        ),
        (
            "resolver_fallbacks",
            "Misses that cost a lookup by handle or a scan",
            stats.resolver.fallbacks,
        ),
    ] {
        counter(&mut registry, name, help, value);
    }
    for (quantile, value) in [
        ("0.5", stats.event_to_row_ms.p50),
        ("0.99", stats.event_to_row_ms.p99),
    ] {
        if let Some(ms) = value {
            let delay = Gauge::<f64, std::sync::atomic::AtomicU64>::default();
            delay.set(ms / 1000.0);
            let place = if quantile == "0.5" { "median" } else { "p99" };
            registry.register(
                format!("event_to_row_{place}_seconds"),
                format!("From a path's first change to its row, quantile {quantile} of the last ones"),
                delay,
            );
        }
    }
    each_cpu(stats, &mut registry);
    each_share(stats, &mut registry);
    let mut out = String::new();
    encode(&mut out, &registry)?;
    Ok(out)
}

fn source(stats: &StatsReport, registry: &mut Registry) {
    for (name, help, value) in [
        ("events", "Events that reached the daemon", stats.events),
        (
            "events_dropped",
            "Events for which the kernel's buffer had no room",
            stats.dropped,
        ),
        (
            "events_coalesced",
            "Changes merged into one that was already waiting",
            stats.coalesced,
        ),
        (
            "events_taken_over",
            "Changes found waiting at the start",
            stats.taken_over,
        ),
        ("overflows", "Times the kernel's buffer was full", stats.overflows),
        (
            "recovered_inodes",
            "Inodes recovered from the map after an overflow",
            stats.recovered,
        ),
        (
            "compared_directories",
            "Directories compared after an overflow",
            stats.dirs_compared,
        ),
        (
            "lost_events",
            "Changes that only a comparison of a whole tree could make good",
            stats.lost,
        ),
    ] {
        counter(registry, name, help, value);
    }
    for (name, help, value) in [
        ("uptime_seconds", "Since the daemon started", stats.uptime_s),
        ("buffer_bytes", "Size of the kernel's buffer", stats.buffer_bytes),
        (
            "buffer_high_water_bytes",
            "The most that was seen waiting in it",
            stats.high_water_bytes,
        ),
        (
            "map_entries",
            "Inodes in the kernel's map of changes",
            stats.map_entries,
        ),
        ("map_capacity", "Inodes that it has room for", stats.map_capacity),
    ] {
        gauge(registry, name, help, value);
    }
}

fn each_cpu(stats: &StatsReport, registry: &mut Registry) {
    let of = |value: fn(&crate::daemon::control::CpuReport) -> u64| {
        stats
            .per_cpu
            .iter()
            .map(move |cpu| (vec![label("cpu", &cpu.cpu.to_string())], value(cpu)))
    };
    family(
        registry,
        "cpu_submitted",
        "Events submitted by a processor",
        &mut of(|cpu| cpu.submitted),
    );
    family(
        registry,
        "cpu_dropped",
        "Events that a processor could not submit",
        &mut of(|cpu| cpu.dropped),
    );
    family(
        registry,
        "cpu_coalesced",
        "Changes that a processor merged",
        &mut of(|cpu| cpu.coalesced),
    );
    let hooks = stats.hooks.iter().filter(|hook| hook.attached);
    let mut hits = hooks.map(|hook| (vec![label("hook", &hook.hook)], hook.hits));
    family(registry, "hook_hits", "Calls that a hook saw", &mut hits);
}

fn each_share(stats: &StatsReport, registry: &mut Registry) {
    let of = |value: fn(&crate::daemon::control::ShareFigures) -> u64| {
        stats
            .shares
            .iter()
            .map(move |share| (vec![label("share", &share.name)], value(share)))
    };
    family(
        registry,
        "rows_made",
        "Rows for changes made on this node",
        &mut of(|s| s.rows_made),
    );
    family(
        registry,
        "rows_applied",
        "Rows of peers that were applied",
        &mut of(|s| s.rows_applied),
    );
    family(
        registry,
        "content_sent_bytes",
        "Content sent",
        &mut of(|s| s.content_sent_bytes),
    );
    family(
        registry,
        "content_received_bytes",
        "Content received",
        &mut of(|s| s.content_received_bytes),
    );
    family(
        registry,
        "rescans",
        "Times the tree was compared with the index",
        &mut of(|s| s.rescans),
    );
}

/// The library writes values as they are; the format wants three characters
/// escaped.
fn label(name: &str, value: &str) -> (String, String) {
    let value = value
        .replace('\\', r"\\")
        .replace('"', r#"\""#)
        .replace('\n', r"\n");
    (name.to_owned(), value)
}

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let metric = Counter::<u64>::default();
    metric.inc_by(value);
    registry.register(name, help, metric);
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let metric = Gauge::<i64>::default();
    metric.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, metric);
}

/// Nothing at all where there are no values.
fn family(registry: &mut Registry, name: &str, help: &str, values: Each<'_>) {
    let mut values = values.peekable();
    if values.peek().is_none() {
        return;
    }
    let metric = Family::<Labels, Counter<u64>>::default();
    for (labels, value) in values {
        metric.get_or_create(&labels).inc_by(value);
    }
    registry.register(name, help, metric);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::control::{CpuReport, Percentiles, ShareFigures, SourceReport};

    #[test]
    fn every_figure_has_a_line_that_collectors_read() {
        let stats = StatsReport {
            source: Some(SourceReport {
                kind: "ebpf".into(),
                attach: Some("fentry".into()),
                transport: None,
                reason: "r".into(),
            }),
            events: 7,
            map_entries: 3,
            event_to_row_ms: Percentiles {
                p50: Some(1.5),
                p99: None,
            },
            per_cpu: vec![CpuReport {
                cpu: 1,
                submitted: 5,
                dropped: 0,
                coalesced: 9,
            }],
            shares: vec![ShareFigures {
                name: "a\"b\\\n".into(),
                rows_made: 4,
                ..ShareFigures::default()
            }],
            ..StatsReport::default()
        };
        let text = text(&stats).expect("text can be written");
        for line in [
            "# TYPE omirr_events counter",
            "omirr_events_total 7",
            "omirr_map_entries 3",
            "omirr_event_to_row_median_seconds 0.0015",
            "omirr_cpu_coalesced_total{cpu=\"1\"} 9",
            "omirr_rows_made_total{share=\"a\\\"b\\\\\\n\"} 4",
            "omirr_source_info{kind=\"ebpf\",attach=\"fentry\",transport=\"\"} 1",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in\n{text}"
            );
        }
        assert!(text.ends_with("# EOF\n") && !text.contains("p99") && !text.contains("hook_hits"));
    }
}
