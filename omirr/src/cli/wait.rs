//! `omirr wait`: a barrier for scripts.

use std::time::Duration;

use clap::Args;

use super::{ConfigFile, Silent, ask, print_json};
use crate::daemon::control::{Lag, Request, WaitReply, WaitRequest};

/// What the daemon gets beyond the barrier's timeout to say who is behind.
const GRACE: Duration = Duration::from_secs(10);

/// Wait until everything that changed before the call is durable on the peers
///
/// A barrier for scripts: changes that the kernel has not reported yet are
/// waited for, too. Exits with 1 at the timeout, and says who is behind by how
/// much and why.
#[derive(Clone, Debug, Args)]
pub(super) struct WaitArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// Wait for this share only [default: every share]
    #[arg(long, value_name = "NAME")]
    share: Option<String>,
    /// Wait for this peer only [default: every peer]
    #[arg(long, value_name = "NAME")]
    peer: Option<String>,
    /// How long at most, as in 500ms, 30s, 5min, 1h
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &WaitArgs) -> anyhow::Result<()> {
    let client = ask::client(&args.config.config)?;
    let request = Request::Wait(WaitRequest {
        share: args.share.clone(),
        peer: args.peer.clone(),
        timeout_ms: u64::try_from(args.timeout.as_millis()).unwrap_or(u64::MAX),
    });
    let patience = args.timeout.saturating_add(GRACE);
    let reply: WaitReply = ask::block_on(async { Ok(client.call(&request, patience).await?) })?;
    if args.json {
        print_json(&reply)?;
        return if reply.done { Ok(()) } else { Err(Silent.into()) };
    }
    if reply.done {
        Ok(())
    } else {
        Err(anyhow::Error::msg(sentence(args.timeout, &reply.behind)))
    }
}

/// Who is behind, by how much and why.
fn sentence(timeout: Duration, behind: &[Lag]) -> String {
    let one = |lag: &Lag| {
        let much = match lag.behind {
            0 => "not known to have everything yet".to_owned(),
            1 => "1 entry behind".to_owned(),
            many => format!("{many} entries behind"),
        };
        let why = lag
            .reason
            .as_ref()
            .map(|why| format!(" ({why})"))
            .unwrap_or_default();
        format!("peer {} of the share {} is {much}{why}", lag.peer, lag.share)
    };
    let timeout = humantime::format_duration(timeout);
    let who = match behind {
        [] => "the daemon does not say who is behind".to_owned(),
        all => all.iter().map(one).collect::<Vec<_>>().join("; "),
    };
    format!("timed out after {timeout}: {who}: see `omirr status`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timeout_says_who_is_behind_and_why() {
        let lag = |peer: &str, behind, reason: Option<&str>| Lag {
            share: "www".into(),
            peer: peer.into(),
            behind,
            reason: reason.map(str::to_owned),
        };
        assert_eq!(
            sentence(
                Duration::from_millis(1500),
                &[
                    lag("web2", 12, Some("connection refused")),
                    lag("web3", 1, None),
                    lag("web4", 0, None)
                ]
            ),
            "timed out after 1s 500ms: peer web2 of the share www is 12 entries behind (connection refused); \
             peer web3 of the share www is 1 entry behind; \
             peer web4 of the share www is not known to have everything yet: see `omirr status`"
        );
    }
}
