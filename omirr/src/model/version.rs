//! Version vectors and hybrid logical clock stamps.
//!
//! The vector says whether one version descends from another or the two are
//! concurrent; the stamp picks the same winner among concurrent ones on every
//! node. A version that descends from another always has the greater stamp,
//! because a node's clock witnesses every stamp it receives.

use serde::{Deserialize, Serialize};

/// One life of one node's index of one share: drawn at random when the index is
/// created, so that a node that lost its index never reuses a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ReplicaId(pub u64);

/// A hybrid logical clock stamp (Kulkarni et al., 2014): wall clock, then a
/// counter for what happened in the same millisecond, then the replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Stamp {
    /// Milliseconds since 1970.
    pub wall_ms: u64,
    pub count: u32,
    pub replica: ReplicaId,
}

/// Replica → counter, ordered by replica, no zero counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Vector(Vec<(ReplicaId, u64)>);

/// How one version relates to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    Equal,
    /// The first descends from the second.
    After,
    /// The second descends from the first.
    Before,
    Concurrent,
}

impl Vector {
    pub fn get(&self, replica: ReplicaId) -> u64 {
        match self.0.binary_search_by_key(&replica, |pair| pair.0) {
            Ok(at) => self.0[at].1,
            Err(_) => 0,
        }
    }

    /// Raises `replica`'s counter to `counter`, if that is more.
    pub fn raise(&mut self, replica: ReplicaId, counter: u64) {
        match self.0.binary_search_by_key(&replica, |pair| pair.0) {
            Ok(at) => self.0[at].1 = self.0[at].1.max(counter),
            Err(at) => self.0.insert(at, (replica, counter)),
        }
    }

    /// The smallest vector that descends from both.
    pub fn join(&self, other: &Vector) -> Vector {
        let mut joined = self.clone();
        for &(replica, counter) in &other.0 {
            joined.raise(replica, counter);
        }
        joined
    }

    pub fn relation(&self, other: &Vector) -> Relation {
        let ahead = self
            .0
            .iter()
            .any(|&(replica, counter)| counter > other.get(replica));
        let behind = other
            .0
            .iter()
            .any(|&(replica, counter)| counter > self.get(replica));
        match (ahead, behind) {
            (false, false) => Relation::Equal,
            (true, false) => Relation::After,
            (false, true) => Relation::Before,
            (true, true) => Relation::Concurrent,
        }
    }

    pub fn pairs(&self) -> &[(ReplicaId, u64)] {
        &self.0
    }

    /// Whether pairs are in strict order with no zero counter: what arrives
    /// from a peer must be checked before it is trusted.
    pub fn is_well_formed(&self) -> bool {
        self.0.windows(2).all(|pair| pair[0].0 < pair[1].0) && self.0.iter().all(|pair| pair.1 > 0)
    }
}

impl FromIterator<(ReplicaId, u64)> for Vector {
    fn from_iter<I: IntoIterator<Item = (ReplicaId, u64)>>(pairs: I) -> Vector {
        let mut vector = Vector::default();
        for (replica, counter) in pairs {
            vector.raise(replica, counter);
        }
        vector
    }
}

/// Sequence numbers that an index has left out: those after `after`, up to `upto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    pub after: u64,
    pub upto: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Version {
    pub vector: Vector,
    pub stamp: Stamp,
}
