//! The directories of one share: who lies where, as a tree that is found by
//! inode number and by name.
//!
//! Only directories are kept, since a file is named by its directory in every
//! event. A share may have a million of them, so a node is 56 bytes and the two
//! indexes hold slots only: below 100 bytes a directory all in all, unless its
//! name is longer than 22 bytes.
//!
//! A node without a parent that is not the root is *detached*: known, but not
//! known where. Invariant: following parents always ends, at the root or at a
//! detached node.

use std::hash::BuildHasher;

use hashbrown::HashTable;
use rustc_hash::FxBuildHasher;

/// The place of a node in the table.
pub(crate) type Slot = u32;
/// No node.
const NONE: Slot = Slot::MAX;
/// Names up to this length are kept inside the node.
const INLINE: usize = 22;

/// A name; most are short, and a heap block for each would double the table.
enum Name {
    Short { len: u8, bytes: [u8; INLINE] },
    Long(Box<[u8]>),
}

impl Name {
    fn new(name: &[u8]) -> Name {
        if name.len() > INLINE {
            return Name::Long(name.into());
        }
        let mut bytes = [0; INLINE];
        bytes[..name.len()].copy_from_slice(name);
        Name::Short {
            len: name.len() as u8,
            bytes,
        }
    }

    fn as_bytes(&self) -> &[u8] {
        match self {
            Name::Short { len, bytes } => &bytes[..usize::from(*len)],
            Name::Long(bytes) => bytes,
        }
    }
}

struct Node {
    ino: u64,
    parent: Slot,
    first_child: Slot,
    /// Siblings, in no order. In a free slot: the next free one.
    next: Slot,
    previous: Slot,
    /// How many events had been applied when one gave it its place; 0 if none has.
    placed: u64,
    name: Name,
}

const _: () = assert!(
    size_of::<Node>() == 56,
    "the bound of memory per directory rests on this"
);

/// The directories of one share.
pub(crate) struct Table {
    nodes: Vec<Node>,
    free: Slot,
    root: Slot,
    by_ino: HashTable<Slot>,
    /// By parent and name; attached nodes only.
    by_name: HashTable<Slot>,
}

fn hash_ino(ino: u64) -> u64 {
    FxBuildHasher.hash_one(ino)
}

fn hash_name(parent: Slot, name: &[u8]) -> u64 {
    FxBuildHasher.hash_one((parent, name))
}

impl Table {
    pub(crate) fn new(root_ino: u64) -> Table {
        let mut table = Table {
            nodes: Vec::new(),
            free: NONE,
            root: NONE,
            by_ino: HashTable::new(),
            by_name: HashTable::new(),
        };
        table.root = table.insert(root_ino);
        table
    }

    pub(crate) fn root(&self) -> Slot {
        self.root
    }

    /// How many directories are known.
    pub(crate) fn len(&self) -> usize {
        self.by_ino.len()
    }

    /// What the table takes in memory, without names that are long.
    pub(crate) fn bytes(&self) -> usize {
        self.nodes.capacity() * size_of::<Node>()
            + self.by_ino.allocation_size()
            + self.by_name.allocation_size()
    }

    fn node(&self, slot: Slot) -> &Node {
        &self.nodes[slot as usize]
    }

    fn node_mut(&mut self, slot: Slot) -> &mut Node {
        &mut self.nodes[slot as usize]
    }

    pub(crate) fn find(&self, ino: u64) -> Option<Slot> {
        self.by_ino
            .find(hash_ino(ino), |&slot| self.node(slot).ino == ino)
            .copied()
    }

    pub(crate) fn child(&self, parent: Slot, name: &[u8]) -> Option<Slot> {
        let is_it = |&slot: &Slot| {
            let node = self.node(slot);
            node.parent == parent && node.name.as_bytes() == name
        };
        self.by_name.find(hash_name(parent, name), is_it).copied()
    }

    pub(crate) fn ino(&self, slot: Slot) -> u64 {
        self.node(slot).ino
    }

    /// When an event last gave it its place, as counted by the resolver.
    pub(crate) fn placed(&self, slot: Slot) -> u64 {
        self.node(slot).placed
    }

    pub(crate) fn set_placed(&mut self, slot: Slot, events: u64) {
        self.node_mut(slot).placed = events;
    }

    pub(crate) fn has_children(&self, slot: Slot) -> bool {
        self.node(slot).first_child != NONE
    }

    /// Whether the node is known, but not where it lies.
    pub(crate) fn is_detached(&self, slot: Slot) -> bool {
        slot != self.root && self.node(slot).parent == NONE
    }

    /// Whether the node lies in `parent` as `name`.
    pub(crate) fn is_at(&self, slot: Slot, parent: Slot, name: &[u8]) -> bool {
        let node = self.node(slot);
        slot != self.root && node.parent == parent && node.name.as_bytes() == name
    }

    /// Whether `slot` is `ancestor` or lies beneath it.
    pub(crate) fn is_within(&self, mut slot: Slot, ancestor: Slot) -> bool {
        while slot != NONE {
            if slot == ancestor {
                return true;
            }
            slot = self.node(slot).parent;
        }
        false
    }

    /// Whether the root is reached by following parents.
    pub(crate) fn is_rooted(&self, slot: Slot) -> bool {
        self.is_within(slot, self.root)
    }

    /// The names from the root to the node, joined by slashes; none if it or
    /// one above it is detached.
    pub(crate) fn path(&self, slot: Slot) -> Option<Vec<u8>> {
        let mut names = Vec::new();
        let mut at = slot;
        while at != self.root {
            let node = self.node(at);
            if node.parent == NONE {
                return None;
            }
            names.push(node.name.as_bytes());
            at = node.parent;
        }
        names.reverse();
        Some(names.join(&b'/'))
    }

    /// Adds a detached node. The number must not be in the table yet.
    pub(crate) fn insert(&mut self, ino: u64) -> Slot {
        let node = Node {
            ino,
            parent: NONE,
            first_child: NONE,
            next: NONE,
            previous: NONE,
            placed: 0,
            name: Name::new(b""),
        };
        let slot = if self.free == NONE {
            self.nodes.push(node);
            (self.nodes.len() - 1) as Slot
        } else {
            let slot = self.free;
            self.free = self.node(slot).next;
            *self.node_mut(slot) = node;
            slot
        };
        let nodes = &self.nodes;
        self.by_ino
            .insert_unique(hash_ino(ino), slot, |&slot| hash_ino(nodes[slot as usize].ino));
        slot
    }

    /// Puts a detached node in its place. The place must be free, and `parent`
    /// must not lie within the node.
    pub(crate) fn attach(&mut self, slot: Slot, parent: Slot, name: &[u8]) {
        debug_assert!(self.is_detached(slot) && !self.is_within(parent, slot));
        debug_assert!(self.child(parent, name).is_none());
        let first = std::mem::replace(&mut self.node_mut(parent).first_child, slot);
        if first != NONE {
            self.node_mut(first).previous = slot;
        }
        let node = self.node_mut(slot);
        node.parent = parent;
        node.next = first;
        node.previous = NONE;
        node.name = Name::new(name);
        let nodes = &self.nodes;
        self.by_name
            .insert_unique(hash_name(parent, name), slot, |&slot| {
                let node = &nodes[slot as usize];
                hash_name(node.parent, node.name.as_bytes())
            });
    }

    /// Takes a node, with what is beneath it, out of its place.
    pub(crate) fn detach(&mut self, slot: Slot) {
        if slot == self.root || self.is_detached(slot) {
            return;
        }
        let node = self.node(slot);
        let (parent, next, previous) = (node.parent, node.next, node.previous);
        let hash = hash_name(parent, node.name.as_bytes());
        if let Ok(entry) = self.by_name.find_entry(hash, |&other| other == slot) {
            entry.remove();
        }
        match previous {
            NONE => self.node_mut(parent).first_child = next,
            _ => self.node_mut(previous).next = next,
        }
        if next != NONE {
            self.node_mut(next).previous = previous;
        }
        let node = self.node_mut(slot);
        (node.parent, node.next, node.previous) = (NONE, NONE, NONE);
    }

    /// Forgets a node and everything beneath it. The root stays.
    pub(crate) fn remove(&mut self, slot: Slot) {
        if slot == self.root {
            return;
        }
        self.detach(slot);
        let mut pending = vec![slot];
        while let Some(slot) = pending.pop() {
            let mut child = self.node(slot).first_child;
            while child != NONE {
                pending.push(child);
                child = self.node(child).next;
            }
            self.free_slot(slot);
        }
    }

    fn free_slot(&mut self, slot: Slot) {
        let node = self.node(slot);
        let by_ino = hash_ino(node.ino);
        if node.parent != NONE {
            let by_name = hash_name(node.parent, node.name.as_bytes());
            if let Ok(entry) = self.by_name.find_entry(by_name, |&other| other == slot) {
                entry.remove();
            }
        }
        if let Ok(entry) = self.by_ino.find_entry(by_ino, |&other| other == slot) {
            entry.remove();
        }
        let free = std::mem::replace(&mut self.free, slot);
        let node = self.node_mut(slot);
        // Nobody may climb from a free slot, and its long name goes back.
        (node.parent, node.first_child, node.next, node.name) = (NONE, NONE, free, Name::new(b""));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_costs_less_than_a_hundred_bytes() {
        let mut table = Table::new(2);
        let mut parent = table.root();
        for n in 0..1_000_000u64 {
            let slot = table.insert(n + 10);
            table.attach(slot, parent, format!("node_modules{n}").as_bytes());
            if n % 1000 == 0 {
                parent = if n % 10_000 == 0 { table.root() } else { slot };
            }
        }
        let each = table.bytes() / table.len();
        assert!(each < 100, "{each} bytes");
        assert_eq!(table.len(), 1_000_001);
    }

    #[test]
    fn freed_slots_are_used_again_and_nothing_of_them_is_found() {
        let mut table = Table::new(1);
        let (a, b) = (table.insert(2), table.insert(3));
        table.attach(a, table.root(), b"a");
        table.attach(b, a, b"a name of more than twenty-two bytes");
        assert_eq!(
            table.path(b).as_deref(),
            Some(&b"a/a name of more than twenty-two bytes"[..])
        );
        table.remove(a);
        assert_eq!((table.len(), table.find(2), table.find(3)), (1, None, None));
        assert_eq!(table.child(table.root(), b"a"), None);
        let c = table.insert(4);
        table.attach(c, table.root(), b"a");
        assert!(table.nodes.len() == 3 && table.path(c).as_deref() == Some(b"a"));
        table.remove(table.root());
        assert_eq!(table.find(1), Some(table.root()));
    }
}
