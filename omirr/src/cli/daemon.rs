//! `omirr daemon`: runs the mirror in the foreground.

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
}

pub(super) fn run(args: &DaemonArgs) -> anyhow::Result<()> {
    crate::daemon::run(&args.config.config)
}
