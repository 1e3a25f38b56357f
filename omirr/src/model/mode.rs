//! In which direction a share's changes go between this node and a peer.

/// What this node does with a peer's share.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The peer is sent what changes here; nothing is taken from it.
    Send,
    /// What the peer sends is taken; it is sent nothing.
    Receive,
    #[default]
    Both,
}

impl Mode {
    /// Whether the peer is sent changes.
    pub fn sends(self) -> bool {
        self != Mode::Receive
    }

    /// Whether the peer's changes are taken.
    pub fn receives(self) -> bool {
        self != Mode::Send
    }

    /// What both allow; none if that is nothing.
    pub fn and(self, other: Mode) -> Option<Mode> {
        match (self, other) {
            (Mode::Both, mode) | (mode, Mode::Both) => Some(mode),
            (a, b) => (a == b).then_some(a),
        }
    }

    /// The word in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Send => "send",
            Mode::Receive => "receive",
            Mode::Both => "both",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_words_allow_what_both_allow() {
        assert_eq!(Mode::Both.and(Mode::Send), Some(Mode::Send));
        assert_eq!(Mode::Receive.and(Mode::Both), Some(Mode::Receive));
        assert_eq!(Mode::Send.and(Mode::Send), Some(Mode::Send));
        assert_eq!(Mode::Send.and(Mode::Receive), None);
    }
}
