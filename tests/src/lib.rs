//! What the tests share: oracles and helpers.

pub mod treewalk;
