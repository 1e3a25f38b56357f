//! What holds where the configuration says nothing. Each default has one home,
//! here; `packaging/omirr.toml` and `interface.md` show the same values.

use std::path::PathBuf;

/// The file that is read unless `-c` names another.
pub const CONFIG_FILE: &str = "/etc/omirr/omirr.toml";

/// The port that omirr has used since its first release.
pub const PORT: u16 = 808;

/// `node.listen`: every IPv4 address. Who may talk is decided by keys, not by
/// addresses.
pub const LISTEN: &str = "0.0.0.0:808";

/// `node.key`: beside the configuration, because it is made by hand, once.
pub const KEY: &str = "/etc/omirr/node.key";

/// `node.state_dir`: what systemd's `StateDirectory=omirr` makes.
pub const STATE_DIR: &str = "/var/lib/omirr";

/// `tracer.ring_size`: the tracer's own default, which `omirr trace` has too.
pub use crate::source::choice::RING_BYTES;

/// `node.name`: the host name, which is what people call the machine.
pub(super) fn node_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// `node.listen`, as the list that it is.
pub(super) fn listen() -> Vec<String> {
    vec![LISTEN.to_owned()]
}

pub(super) fn key() -> PathBuf {
    PathBuf::from(KEY)
}

pub(super) fn state_dir() -> PathBuf {
    PathBuf::from(STATE_DIR)
}
