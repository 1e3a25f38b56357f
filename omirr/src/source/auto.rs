//! Takes the best event source that works on this host.
//!
//! In: what was asked for and what is to be watched. Out: a running source,
//! whose `about` says why it and not a better one. Whether something works is
//! found by doing it; no kernel version is ever compared.

use super::choice::{Attach, DIRTY_ENTRIES, Detail, SourceConfig, SourceKind, Transport};
use super::ebpf::{self, EbpfError, EbpfSource};
use super::fanotify::FanotifySource;
use super::scan::ScanSource;
use super::{Sink, Source, Watch};

/// Starts the source that `config` asks for, or the best that works. For each
/// attempt `sink_factory` makes a sink; sinks of attempts that come to nothing
/// are dropped without having been called.
pub fn open(
    config: &SourceConfig,
    watches: &[Watch],
    sink_factory: impl Fn() -> Sink,
    own_pid: Option<u32>,
) -> anyhow::Result<Box<dyn Source>> {
    match config.source {
        SourceKind::Ebpf => open_ebpf(config, watches, own_pid, sink_factory())
            .map_err(|why| anyhow::anyhow!("the source \"ebpf\" cannot run here: {why}; {ALTERNATIVE}")),
        SourceKind::Fanotify => {
            let mut source =
                FanotifySource::open(watches, own_pid, config.detail, sink_factory()).map_err(|why| {
                    anyhow::anyhow!("the source \"fanotify\" cannot run here: {why}; {ALTERNATIVE}")
                })?;
            source.set_reason("fanotify was asked for".to_owned() + source.limitation());
            Ok(Box::new(source))
        }
        SourceKind::Scan => {
            let source = ScanSource::open(config.scan_interval, "scan was asked for".into(), sink_factory())?;
            Ok(Box::new(source))
        }
        SourceKind::Auto => best(config, watches, sink_factory, own_pid),
    }
}

/// The way out when a source was asked for by name and cannot run.
const ALTERNATIVE: &str = "choose the source \"auto\", or see `omirr doctor` for what to change";

fn best(
    config: &SourceConfig,
    watches: &[Watch],
    sink_factory: impl Fn() -> Sink,
    own_pid: Option<u32>,
) -> anyhow::Result<Box<dyn Source>> {
    let no_ebpf = match open_ebpf(config, watches, own_pid, sink_factory()) {
        Ok(source) => return Ok(source),
        Err(why) => why,
    };
    tracing::debug!(why = %no_ebpf, "eBPF is not used");
    let no_fanotify = match FanotifySource::open(watches, own_pid, config.detail, sink_factory()) {
        Ok(mut source) => {
            source.set_reason(format!("{no_ebpf}, so fanotify is used{}", source.limitation()));
            return Ok(Box::new(source));
        }
        Err(why) => why.to_string(),
    };
    tracing::debug!(why = %no_fanotify, "fanotify is not used");
    let interval = humantime::format_duration(config.scan_interval);
    let reason = format!("{no_ebpf}, and {no_fanotify}, so the tree is compared every {interval}");
    Ok(Box::new(ScanSource::open(
        config.scan_interval,
        reason,
        sink_factory(),
    )?))
}

/// Starts the eBPF source, or says in half a sentence why that is not possible.
fn open_ebpf(
    config: &SourceConfig,
    watches: &[Watch],
    own_pid: Option<u32>,
    sink: Sink,
) -> Result<Box<dyn Source>, String> {
    let options = ebpf::Options {
        attach: match config.attach {
            Attach::Auto => ebpf::Attach::Auto,
            Attach::Fentry => ebpf::Attach::Fentry,
            Attach::Kprobe => ebpf::Attach::Kprobe,
        },
        transport: match config.transport {
            Transport::Auto => ebpf::Transport::Auto,
            Transport::Ring => ebpf::Transport::Ring,
            Transport::Perf => ebpf::Transport::Perf,
        },
        ring_bytes: config.ring_bytes,
        dirty_entries: (config.detail == Detail::Lean).then_some(DIRTY_ENTRIES),
        keep: config.keep.clone(),
    };
    match EbpfSource::open(watches, options, own_pid, sink) {
        Ok(source) => Ok(Box::new(source)),
        Err(EbpfError::NotEmbedded) => Err("this omirr was built without eBPF".into()),
        Err(error) => {
            let text = error.to_string();
            // The way out is said by whoever asked, for the whole choice.
            Err(text
                .split_once("; `omirr doctor`")
                .map_or(&*text, |(what, _)| what)
                .to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn watch() -> Watch {
        let path = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let stat = std::fs::metadata(&path).expect("it is there");
        Watch {
            path,
            dev: stat.dev(),
            ino: stat.ino(),
        }
    }

    fn no_sink() -> Sink {
        Box::new(|_| ())
    }

    #[test]
    fn auto_always_finds_one_and_says_why() {
        let source = open(&SourceConfig::default(), &[watch()], no_sink, None).expect("scan always works");
        let about = source.about();
        assert!(["ebpf", "fanotify", "scan"].contains(&about.kind));
        assert!(!about.reason.is_empty(), "{about:?}");
        assert_eq!(about.attach.is_some(), about.kind == "ebpf");
    }

    #[test]
    fn a_source_that_was_asked_for_is_taken_or_refused_but_not_replaced() {
        let config = SourceConfig {
            source: SourceKind::Scan,
            ..SourceConfig::default()
        };
        assert_eq!(
            open(&config, &[watch()], no_sink, None)
                .expect("scan always works")
                .about()
                .kind,
            "scan"
        );
        for (source, kind) in [(SourceKind::Fanotify, "fanotify"), (SourceKind::Ebpf, "ebpf")] {
            let config = SourceConfig {
                source,
                ..SourceConfig::default()
            };
            match open(&config, &[watch()], no_sink, None) {
                Ok(source) => assert_eq!(source.about().kind, kind),
                Err(error) => assert!(error.to_string().contains("omirr doctor"), "{error}"),
            }
        }
    }
}
