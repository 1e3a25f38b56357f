//! `omirr daemon`: runs the mirror in the foreground.

use std::io::{self, Write};

use clap::Args;

use super::ConfigFile;

/// Run the mirror in the foreground
///
/// SIGTERM or Ctrl-C ends it cleanly, SIGHUP rereads the configuration; under
/// systemd it is a service of Type=notify.
#[derive(Clone, Debug, Args)]
pub(super) struct DaemonArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// Do not run: detach the tracing programs that a daemon has left attached
    ///
    /// A daemon that ends leaves its programs in the kernel, so that the next one
    /// knows what changed meanwhile. This takes them away, for good; the next
    /// daemon will compare the trees.
    #[arg(long)]
    unpin: bool,
}

pub(super) fn run(args: &DaemonArgs) -> anyhow::Result<()> {
    if args.unpin {
        let removed = crate::daemon::unpin(&args.config.config)?;
        let said = if removed {
            "the tracing programs are detached"
        } else {
            "no tracing programs were left attached"
        };
        return Ok(writeln!(io::stdout(), "{said}")?);
    }
    crate::daemon::run(&args.config.config)
}
