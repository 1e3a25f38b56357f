//! `omirr status`: shares, peers, how far behind, what is pending and why.

use std::{collections::BTreeMap, fmt::Write};

use clap::Args;

use super::{
    ask::{self, ReportArgs},
    terminal::{Paint, Table, Tone, number, plain},
};
use crate::daemon::control::{
    PeerReport, PeerState, Request, ShareReport, ShareState, SourceReport, StatusReport,
};
use crate::model::Mode;

/// Show shares and peers, how far behind they are, what is pending and why
#[derive(Clone, Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    report: ReportArgs,
}

pub(super) fn run(args: &StatusArgs) -> anyhow::Result<()> {
    ask::print(&args.report, &Request::Status, render)
}

fn render(status: &StatusReport, paint: Paint, out: &mut String) {
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "{}  omirr {}, pid {}, up {}",
        paint.word(Tone::Head, &plain(&status.node)),
        plain(&status.version),
        status.pid,
        uptime(status.uptime_s)
    );
    render_source(&status.source, out);
    if status.shares.is_empty() {
        return;
    }
    out.push('\n');
    let mut shares = Table::new(&["SHARE", "STATE", "ENTRIES", "PENDING", "CONFLICTS", "PATH"]);
    for share in &status.shares {
        shares.row(vec![
            (Tone::Plain, share.name.clone()),
            (share_tone(share.state), state_words(share)),
            (Tone::Plain, number(share.entries)),
            (busy_unless_zero(share.pending), number(share.pending)),
            (Tone::Plain, number(share.conflicts)),
            (Tone::Plain, share.path.clone()),
        ]);
    }
    shares.render(0, paint, out);
    out.push('\n');
    let mut peers = Table::new(&["SHARE", "PEER", "STATE", "BEHIND", "ADDRESS", "LAST ERROR"]);
    for share in &status.shares {
        for peer in &share.peers {
            peers.row(peer_row(&share.name, peer));
        }
    }
    peers.render(0, paint, out);
    for share in &status.shares {
        render_notes(share, paint, out);
    }
    // A peer has one clock, in however many shares.
    let peers = status.shares.iter().flat_map(|share| &share.peers);
    let clocks: BTreeMap<&str, &str> = peers
        .filter_map(|peer| Some((peer.name.as_str(), peer.clock_warning.as_deref()?)))
        .collect();
    for text in clocks.values() {
        let _ = writeln!(out, "\n{} {}", paint.word(Tone::Bad, "clocks:"), plain(text));
    }
}

/// The event source, in one line.
pub(super) fn render_source(source: &SourceReport, out: &mut String) {
    let ways = [&source.attach, &source.transport];
    let kind: Vec<&str> = std::iter::once(source.kind.as_str())
        .chain(ways.into_iter().flatten().map(String::as_str))
        .collect();
    let _ = writeln!(
        out,
        "source: {}: {}",
        plain(&kind.join(", ")),
        plain(&source.reason)
    );
}

/// `1d 2h`, with no more than two units: nobody needs the seconds of a week.
pub(super) fn uptime(seconds: u64) -> String {
    let text = humantime::format_duration(std::time::Duration::from_secs(seconds)).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

fn state_words(share: &ShareReport) -> String {
    match share.progress {
        Some(progress) if progress.total > 0 => {
            let percent = u128::from(progress.done.min(progress.total)) * 100 / u128::from(progress.total);
            format!("{} {percent} %", share.state.name())
        }
        _ => share.state.name().to_owned(),
    }
}

fn share_tone(state: ShareState) -> Tone {
    match state {
        ShareState::InSync => Tone::Good,
        ShareState::Scanning | ShareState::Syncing => Tone::Busy,
        ShareState::Stopped => Tone::Bad,
    }
}

fn busy_unless_zero(count: u64) -> Tone {
    if count == 0 { Tone::Plain } else { Tone::Busy }
}

fn peer_row(share: &str, peer: &PeerReport) -> Vec<(Tone, String)> {
    let tone = match peer.state {
        PeerState::Connected => Tone::Good,
        PeerState::Connecting => Tone::Busy,
        PeerState::Stopped => Tone::Bad,
    };
    let state = match peer.mode {
        Mode::Both => peer.state.name().to_owned(),
        one_way => format!("{}, {} only", peer.state.name(), one_way.name()),
    };
    vec![
        (Tone::Plain, share.to_owned()),
        (Tone::Plain, peer.name.clone()),
        (tone, state),
        (busy_unless_zero(peer.behind), number(peer.behind)),
        (Tone::Plain, peer.address.clone()),
        (
            Tone::Plain,
            peer.last_error.clone().unwrap_or_else(|| "-".to_owned()),
        ),
    ]
}

/// Why a share is stopped, where its conflicts are listed, and what is pending in it.
fn render_notes(share: &ShareReport, paint: Paint, out: &mut String) {
    if let Some(reason) = &share.reason {
        let tone = if share.state == ShareState::Stopped {
            Tone::Bad
        } else {
            Tone::Busy
        };
        let _ = writeln!(
            out,
            "\n{}: {}",
            paint.word(tone, &plain(&share.name)),
            plain(reason)
        );
    }
    if share.conflicts > 0 {
        let copies = match share.conflicts {
            1 => "1 conflict copy".to_owned(),
            many => format!("{} conflict copies", number(many)),
        };
        let _ = writeln!(
            out,
            "\n{}: {copies}: see `omirr conflicts list`",
            plain(&share.name)
        );
    }
    if !share.lacking.is_empty() {
        let _ = writeln!(
            out,
            "\ncannot be had in {}, all else of these entries is there:",
            plain(&share.name)
        );
        let mut items = Table::default();
        for lacking in &share.lacking {
            let entries = match lacking.entries {
                1 => "1 entry".to_owned(),
                many => format!("{} entries", number(many)),
            };
            items.row(vec![(Tone::Plain, entries), (Tone::Busy, lacking.reason.clone())]);
        }
        items.render(2, paint, out);
    }
    if share.pending_items.is_empty() {
        return;
    }
    let _ = writeln!(out, "\npending in {}:", plain(&share.name));
    let mut items = Table::default();
    for item in &share.pending_items {
        items.row(vec![
            (Tone::Plain, item.path.clone()),
            (Tone::Plain, format!("from {}", item.peer)),
            (Tone::Bad, item.reason.clone()),
        ]);
    }
    items.render(2, paint, out);
    let more = share.pending.saturating_sub(share.pending_items.len() as u64);
    if more > 0 {
        let _ = writeln!(out, "  and {} more", number(more));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::control::{Lacking, PendingItem, Progress};

    #[test]
    fn a_person_sees_what_is_behind_and_why() {
        let status = StatusReport {
            node: "web1".into(),
            version: "0.1.0".into(),
            pid: 77,
            uptime_s: 93784,
            source: SourceReport {
                kind: "ebpf".into(),
                attach: Some("fentry".into()),
                transport: Some("ring".into()),
                reason: "everything it needs is here".into(),
            },
            shares: vec![
                ShareReport {
                    name: "www".into(),
                    path: "/srv/www".into(),
                    state: ShareState::Scanning,
                    reason: None,
                    entries: 81234,
                    pending: 3,
                    conflicts: 1,
                    tombstones: 0,
                    lacking: vec![Lacking {
                        reason: "this filesystem does not keep the flag 'C' (chattr)".into(),
                        entries: 1200,
                    }],
                    pending_items: vec![PendingItem {
                        path: "a/b".into(),
                        peer: "web2".into(),
                        reason: "no space left on device".into(),
                    }],
                    progress: Some(Progress { done: 1, total: 3 }),
                    peers: vec![PeerReport {
                        name: "web2".into(),
                        address: "web2.example.org:808".into(),
                        state: PeerState::Connecting,
                        mode: Mode::Send,
                        behind: 12,
                        last_error: Some("connection\nrefused".into()),
                        clock_ahead_ms: Some(-3_600_000),
                        clock_warning: Some("the clock of web2 is 1h behind this node's".into()),
                    }],
                },
                ShareReport {
                    name: "mail".into(),
                    path: "/srv/mail".into(),
                    state: ShareState::Stopped,
                    reason: Some("the tree has vanished".into()),
                    entries: 5,
                    pending: 0,
                    conflicts: 0,
                    tombstones: 9,
                    lacking: Vec::new(),
                    pending_items: Vec::new(),
                    progress: None,
                    peers: Vec::new(),
                },
            ],
        };
        let mut out = String::new();
        render(&status, Paint { on: false }, &mut out);
        assert_eq!(
            out,
            "\
web1  omirr 0.1.0, pid 77, up 1day 2h
source: ebpf, fentry, ring: everything it needs is here

SHARE  STATE          ENTRIES  PENDING  CONFLICTS  PATH
www    scanning 33 %  81,234   3        1          /srv/www
mail   stopped        5        0        0          /srv/mail

SHARE  PEER  STATE                  BEHIND  ADDRESS               LAST ERROR
www    web2  connecting, send only  12      web2.example.org:808  connection refused

www: 1 conflict copy: see `omirr conflicts list`

cannot be had in www, all else of these entries is there:
  1,200 entries  this filesystem does not keep the flag 'C' (chattr)

pending in www:
  a/b  from web2  no space left on device
  and 2 more

mail: the tree has vanished

clocks: the clock of web2 is 1h behind this node's
"
        );
    }
}
