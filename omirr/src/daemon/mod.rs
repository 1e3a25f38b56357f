//! The tasks that join the rooms, and what the daemon owns on its host: the
//! state directory and the control socket.

pub mod control;
mod state_dir;

pub use state_dir::{StateDir, StateError};
