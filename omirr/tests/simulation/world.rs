//! Nodes, the connections between them, and what happens to them: everything
//! follows from one seed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use omirr::engine::{Claim, Outgoing, Policy};
use omirr::model::{Entry, Flags, Kind, Record, RelPath, ReplicaId};

use crate::disk::Disk;
use crate::node::{Crashed, Event, Node, Sent, Want, name_of, shown};
use crate::random::Rng;
use crate::restores::Backup;
use crate::trace::Trace;
use crate::users::Users;

/// How many rounds of everybody talking to everybody may pass until nothing
/// changes any more.
const ROUNDS: usize = 400;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Everybody changes everything.
    Free,
    /// Only the first node's users change anything: all trees become its tree.
    OneWriter,
    /// Each node's users stay beneath a directory of their own: nothing
    /// conflicts, and every one of these stays as its users left it.
    Apart,
}

#[derive(Debug)]
enum Message {
    Batch {
        upto: u64,
        rows: Vec<Sent>,
    },
    Want(Want),
    Ack {
        durable: u64,
        head: u64,
    },
    Content {
        want: Want,
        have: bool,
    },
    /// Begin again after this number, and send moves up to that one row by row.
    Plain(u64, u64),
    Again,
}

/// One direction of rows between two nodes: `from` dialled.
struct Connection {
    outgoing: Outgoing,
    /// The sender's index when it connected.
    replica: ReplicaId,
    /// On the way to the receiver, and to the sender.
    forth: VecDeque<Message>,
    back: VecDeque<Message>,
}

pub(crate) struct Place {
    pub(crate) node: Node,
    pub(crate) up: bool,
    pub(crate) clean: bool,
    skew_ms: i64,
    /// Events that have not arrived yet.
    pub(crate) events: Vec<RelPath>,
    pub(crate) lost: bool,
    /// Counts the lives of the process.
    boot: u64,
    /// Per peer: its boot and this node's head when it was first heard of.
    heard: BTreeMap<u32, (u64, u64)>,
    pub(crate) backups: Vec<Backup>,
    /// What a tree that was put back beneath its index has written again.
    pub(crate) rewritten: Vec<Kind>,
    /// The head of the index when it was last found whole.
    whole: u64,
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) users: Users,
    pub(crate) manner: Manner,
    policy: Policy,
    pub(crate) places: Vec<Place>,
    /// Backups are made and put back.
    pub(crate) restores: bool,
    /// What a node must not find, and has found.
    fault: Option<String>,
    /// Who may talk to whom.
    links: Vec<(usize, usize)>,
    connections: BTreeMap<(usize, usize), Connection>,
    homes: Vec<RelPath>,
    pub(crate) trace: Trace,
}

pub(crate) fn root_entry(users: &mut Users) -> Entry {
    let mtime = users.time(0);
    Entry {
        kind: Kind::Directory,
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime,
        xattrs: Vec::new(),
        flags: Flags::NONE,
        user: None,
        group: None,
        link: None,
    }
}

impl World {
    pub(crate) fn new(seed: u64, traced: bool) -> World {
        let mut rng = Rng::new(seed);
        let mut users = Users::new();
        // Two to five nodes mostly: what goes wrong among eight does so among
        // few, and sooner.
        let most = if rng.chance(85) { 4 } else { 7 };
        let count = 2 + rng.below(most) as usize;
        let manner = match rng.below(10) {
            0..=5 => Manner::Free,
            6..=7 => Manner::OneWriter,
            _ => Manner::Apart,
        };
        let policy = if rng.chance(85) {
            Policy::KeepBoth
        } else {
            Policy::NewestWins
        };
        // With one writer, what was sent must survive its crash for the trees
        // to become exactly its tree.
        let hasty = manner == Manner::Free && rng.chance(50);
        let mut links = Vec::new();
        let shape = rng.below(5);
        for a in 0..count {
            let parent = rng.below(a.max(1) as u64) as usize;
            for b in 0..a {
                let linked = match shape {
                    // All with all, a chain, a star, a ring, a tree with some
                    // more links.
                    0 => true,
                    1 => a == b + 1,
                    2 => b == 0,
                    3 => a == b + 1 || (b == 0 && a == count - 1),
                    _ => b == parent || rng.chance(15),
                };
                if linked {
                    links.extend([(a, b), (b, a)]);
                }
            }
        }
        let root = root_entry(&mut users);
        let mut homes = Vec::new();
        let mut places = Vec::new();
        for id in 0..count {
            let mut disk = Disk::new(root.clone());
            let mut home = RelPath::root();
            if manner == Manner::Apart {
                home = RelPath::root()
                    .join(format!("home{id}").as_bytes())
                    .expect("a name");
                let ino = disk.make(&root);
                disk.put(&home, ino).expect("the root is there");
                disk.set(&RelPath::root(), &root).expect("the root is there");
            }
            homes.push(home);
            let mut node = Node::new(id as u64, disk, policy, hasty, rng.next(), traced);
            node.start(true, users.now_ms());
            let skew_ms = if rng.chance(50) {
                0
            } else {
                rng.below(7_200_000) as i64 - 3_600_000
            };
            let (events, heard) = (Vec::new(), BTreeMap::new());
            places.push(Place {
                node,
                up: true,
                clean: true,
                skew_ms,
                events,
                lost: false,
                boot: 0,
                heard,
                backups: Vec::new(),
                rewritten: Vec::new(),
                whole: 0,
            });
        }
        // Where all of a tree stays as its users left it, nothing is put back.
        let restores = manner != Manner::Apart && rng.chance(40);
        let mut trace = Trace::new(traced);
        trace.say(|| {
            format!(
                "{count} nodes, links {links:?}, {manner:?}, {policy:?}, {}",
                if hasty {
                    "sends before durable"
                } else {
                    "sends what is durable"
                }
            )
        });
        World {
            rng,
            users,
            manner,
            policy,
            places,
            restores,
            fault: None,
            links,
            connections: BTreeMap::new(),
            homes,
            trace,
        }
    }

    /// A whole history; an error says what is wrong at its end.
    pub(crate) fn run(&mut self) -> Result<(), String> {
        let mut left = BTreeMap::new();
        // The later chapters begin with equal trees.
        let chapters = 1 + self.rng.below(3);
        for _ in 0..chapters {
            for _ in 0..20 + self.rng.below(120 / chapters) {
                self.something();
                self.drain_logs();
                self.check_whole()?;
                self.fault.take().map_or(Ok(()), Err)?;
            }
            left = self.left(&self.homes);
            self.heal()?;
        }
        self.check()?;
        self.check_left(&left)?;
        self.restores = false;
        self.check_forgotten()
    }

    fn something(&mut self) {
        let at = self.rng.below(self.places.len() as u64) as usize;
        self.users.now_ns += self.rng.below(3_000_000_000);
        if self.restores && self.rng.chance(4) {
            return self.save_or_restore(at);
        }
        match self.rng.below(100) {
            0..=26 => self.act(at),
            27..=28 => self.acknowledge(),
            29 => self.sweep(at),
            30..=39 => self.deliver_events(at),
            40..=54 => self.settle(at, true),
            55..=84 => self.talk(),
            85..=88 => self.cut(),
            89..=90 if self.places[at].up => self.places[at].node.commit(),
            91..=92 => self.crash(at),
            93..=94 => self.stop(at),
            95 => self.lose_index(at),
            96 => self.acknowledge(),
            97 => self.start(at),
            98 if self.rng.chance(50) => self.sweep(at),
            98 if self.places[at].up && self.places[at].lost => self.rescan(at),
            99 => {
                let skew = self.rng.below(7_200_000) as i64 - 3_600_000;
                self.trace.say(|| format!("n{at} clock off by {skew} ms"));
                self.places[at].skew_ms = skew;
            }
            _ => {}
        }
    }

    pub(crate) fn set_clock(&mut self, at: usize) {
        self.places[at].node.disk.clock = self.users.time(self.places[at].skew_ms);
    }

    fn act(&mut self, at: usize) {
        if self.manner == Manner::OneWriter && at != 0 {
            return;
        }
        self.set_clock(at);
        let place = &mut self.places[at];
        let (said, paths) = self.users.act(
            &mut self.rng,
            &mut place.node.disk,
            &format!("n{at}"),
            &self.homes[at],
        );
        self.trace.say(|| format!("n{at} user: {said}"));
        if self.rng.chance(85) {
            place.events.extend(paths);
        } else {
            self.trace.say(|| format!("n{at} loses the events"));
            place.lost = true;
        }
    }

    /// Some events arrive, some of them twice.
    fn deliver_events(&mut self, at: usize) {
        let place = &mut self.places[at];
        if !place.up {
            return;
        }
        let events = std::mem::take(&mut place.events);
        for path in events {
            if self.rng.chance(70) {
                if self.rng.chance(10) {
                    place.events.push(path.clone());
                }
                place.node.dirty.insert(path);
            } else {
                place.events.push(path);
            }
        }
    }

    fn rescan(&mut self, at: usize) {
        self.trace.say(|| format!("n{at} rescans"));
        let place = &mut self.places[at];
        place.node.rescan();
        place.events.clear();
        place.lost = false;
    }

    /// A node deals with what waits; users and crashes come between.
    fn settle(&mut self, at: usize, chaos: bool) {
        if !self.places[at].up {
            return;
        }
        self.set_clock(at);
        let place = &mut self.places[at];
        let users = (self.manner != Manner::OneWriter || at == 0) && chaos;
        let (rng, world_users, home) = (&mut self.rng, &mut self.users, &self.homes[at]);
        let (events, lost, skew_ms) = (&mut place.events, &mut place.lost, place.skew_ms);
        let mut said = Vec::new();
        let mut between = |disk: &mut Disk| {
            disk.clock = world_users.time(skew_ms);
            if chaos && rng.chance(1) {
                return Event::Crash;
            }
            if users && rng.chance(4) {
                let (what, paths) = world_users.act(rng, disk, &format!("n{at}"), home);
                said.push(format!("n{at} user meanwhile: {what}"));
                match rng.below(3) {
                    0 => return Event::Changed(paths),
                    1 => events.extend(paths),
                    _ => *lost = true,
                }
            }
            Event::Nothing
        };
        let result = place.node.settle(&mut between);
        for line in said {
            self.trace.say(|| line);
        }
        if let Err(Crashed) = result {
            self.crash(at);
            return;
        }
        self.drain_logs();
        for (peer, want) in std::mem::take(&mut self.places[at].node.wants) {
            if let Some(connection) = self.connections.get_mut(&(peer as usize, at)) {
                connection.back.push_back(Message::Want(want));
            }
        }
        for (peer, after, plain_upto) in std::mem::take(&mut self.places[at].node.plains) {
            if let Some(connection) = self.connections.get_mut(&(peer as usize, at)) {
                connection.back.push_back(Message::Plain(after, plain_upto));
            }
        }
    }

    pub(crate) fn crash(&mut self, at: usize) {
        if self.places[at].up {
            self.drain_logs();
            self.trace.say(|| format!("n{at} CRASHES"));
            self.down(at, false);
        }
    }

    pub(crate) fn stop(&mut self, at: usize) {
        if self.places[at].up {
            self.trace.say(|| format!("n{at} stops"));
            self.places[at].node.commit();
            self.down(at, true);
        }
    }

    fn down(&mut self, at: usize, clean: bool) {
        let place = &mut self.places[at];
        place.up = false;
        place.clean = clean;
        place.events.clear();
        place.lost = false;
        self.connections.retain(|(from, to), _| *from != at && *to != at);
    }

    pub(crate) fn start(&mut self, at: usize) {
        if self.places[at].up {
            return;
        }
        self.trace.say(|| format!("n{at} starts"));
        self.set_clock(at);
        let place = &mut self.places[at];
        place.up = true;
        place.boot += 1;
        place.heard.clear();
        let clean = place.clean;
        place.node.start(clean, self.users.now_ms());
        self.drain_logs();
    }

    /// Whether a peer that has `from`'s rows up to `cursor` can have them. If not,
    /// the sender takes another number for itself, and dials again.
    fn fits(&mut self, from: usize, to: usize, cursor: u64) -> bool {
        let node = &mut self.places[from].node;
        if node.hasty {
            // What was sent before it was durable may be lost by any crash.
            return true;
        }
        match node.opening.claim(node.replica, cursor, node.durable.head()) {
            Claim::Fits => return true,
            Claim::SetBack(gap) if node.set_back => {
                self.trace
                    .say(|| format!("n{from} learns from n{to}, which has {cursor}, that it was set back"));
                node.renew(gap);
            }
            claim => {
                self.fault = Some(format!("n{to} has row {cursor} of n{from}: {claim:?}"));
            }
        }
        false
    }

    /// A pair of nodes connects, or something moves between them.
    fn talk(&mut self) {
        let Some(&(from, to)) = self.rng.pick(&self.links) else {
            return;
        };
        if !self.connections.contains_key(&(from, to)) {
            if self.rng.chance(70) {
                self.connect(from, to);
            }
            return;
        }
        let _moved = match self.rng.below(4) {
            0..=1 => {
                let most = 1 + self.rng.below(12);
                let limit = 1 + self.rng.below(most) as usize;
                self.send(from, to, limit)
            }
            2 => self.forth(from, to, true),
            _ => self.back(from, to),
        };
    }

    fn connect(&mut self, from: usize, to: usize) {
        if !self.places[from].up || !self.places[to].up || self.connections.contains_key(&(from, to)) {
            return;
        }
        self.hear(from, to);
        self.hear(to, from);
        let replica = self.places[from].node.replica;
        let known = self.places[to]
            .node
            .index
            .cursors
            .entry(from as u32)
            .or_insert((replica, 0));
        if known.0 != replica {
            *known = (replica, 0);
        }
        let cursor = known.1;
        // What the last connection brought and was not applied comes again.
        self.places[to]
            .node
            .pending
            .retain(|(peer, _), _| *peer != from as u32);
        self.places[to].node.behind.remove(&(from as u32));
        self.places[to].node.deaf.remove(&(from as u32));
        self.places[to].node.received.insert(from as u32, cursor);
        let (theirs, head) = {
            let node = &self.places[to].node;
            (node.replica, node.index.head())
        };
        let marks = self.places[from].node.marks.entry(to as u32).or_default();
        marks.connected(theirs, cursor, head);
        if !self.fits(from, to, cursor) {
            return;
        }
        let fresh_after = self.places[from].heard[&(to as u32)].1;
        self.trace
            .say(|| format!("n{from} connects to n{to} at cursor {cursor}, fresh after {fresh_after}"));
        let outgoing = Outgoing::new(to as u32, cursor, fresh_after);
        let connection = Connection {
            outgoing,
            replica,
            forth: VecDeque::new(),
            back: VecDeque::new(),
        };
        self.connections.insert((from, to), connection);
    }

    fn hear(&mut self, at: usize, peer: usize) {
        let boot = self.places[peer].boot;
        let place = &mut self.places[at];
        let head = place.node.author.seq();
        let heard = place.heard.entry(peer as u32).or_insert((boot, head));
        if heard.0 != boot {
            *heard = (boot, head);
            // Rows of the peer's last life that still wait would get numbers
            // after that head, as if the present life had sent them.
            place.node.pending.retain(|(from, _), _| *from != peer as u32);
            // With them goes what is known of how far that life's rows came.
            place.node.received.remove(&(peer as u32));
            place.node.behind.remove(&(peer as u32));
        }
    }

    /// A receiver says how far it is.
    fn acknowledge(&mut self) {
        let keys: Vec<(usize, usize)> = self.connections.keys().copied().collect();
        if let Some(&key) = self.rng.pick(&keys) {
            self.acknowledge_on(key);
        }
    }

    fn acknowledge_on(&mut self, (from, to): (usize, usize)) {
        let node = &self.places[to].node;
        // Of a cursor that only passed by what is known nothing can be lost.
        let cursors = match Arc::ptr_eq(&node.index.records, &node.durable.records) {
            true => &node.index.cursors,
            false => &node.durable.cursors,
        };
        let Some(&(replica, durable)) = cursors.get(&(from as u32)) else {
            return;
        };
        let head = node.index.head();
        // A cursor of the sender's former index is not about this connection.
        if let Some(connection) = self.connections.get_mut(&(from, to))
            && replica == connection.replica
        {
            self.trace
                .say(|| format!("n{to} has n{from}'s rows up to {durable}, its own head is {head}"));
            connection.back.push_back(Message::Ack { durable, head });
        }
    }

    fn sweep(&mut self, at: usize) {
        if self.restores && self.manner == Manner::OneWriter {
            // An older tree brings back what was deleted where that is forgotten:
            // then it would not be the writer's tree that all have in the end.
            return;
        }
        let linked = self.links.iter().filter(|(from, _)| *from == at);
        let peers: Vec<u32> = linked.map(|(_, to)| *to as u32).collect();
        if self.places[at].up {
            self.trace.say(|| format!("n{at} sweeps"));
            self.places[at].node.sweep(&peers);
        }
    }

    fn cut(&mut self) {
        let keys: Vec<(usize, usize)> = self.connections.keys().copied().collect();
        if let Some(&(from, to)) = self.rng.pick(&keys) {
            self.trace.say(|| format!("n{from} to n{to} is cut"));
            self.connections.remove(&(from, to));
        }
    }

    fn send(&mut self, from: usize, to: usize, limit: usize) -> bool {
        let Some(connection) = self.connections.get_mut(&(from, to)) else {
            return false;
        };
        let node = &mut self.places[from].node;
        let Some((upto, rows)) = node.next_batch(&mut connection.outgoing, limit) else {
            return false;
        };
        self.trace.say(|| {
            let paths = rows.iter().map(|sent| {
                let tree = sent.moved_tree.as_ref();
                let tree = tree.map_or(String::new(), |tree| format!(" (moved to {})", tree.to));
                format!("{}#{}{tree}", sent.path, sent.seq)
            });
            format!(
                "n{from} to n{to}: upto {upto}, {}",
                paths.collect::<Vec<_>>().join(" ")
            )
        });
        connection.forth.push_back(Message::Batch { upto, rows });
        true
    }

    fn forth(&mut self, from: usize, to: usize, chaos: bool) -> bool {
        let Some(connection) = self.connections.get_mut(&(from, to)) else {
            return false;
        };
        let peer = from as u32;
        match connection.forth.pop_front() {
            Some(Message::Batch { upto, rows }) => {
                self.places[to].node.receive(peer, upto, rows);
                if self.rng.chance(60) {
                    self.settle(to, chaos);
                }
            }
            Some(Message::Content { want, have }) => self.places[to].node.content(peer, &want, have),
            Some(Message::Again) => self.places[to].node.again(peer),
            _ => return false,
        }
        true
    }

    fn back(&mut self, from: usize, to: usize) -> bool {
        let Some(connection) = self.connections.get_mut(&(from, to)) else {
            return false;
        };
        let want = loop {
            match connection.back.pop_front() {
                Some(Message::Want(want)) => break want,
                // Nothing follows from it but that something may be forgotten.
                Some(Message::Ack { durable, head }) => {
                    let marks = self.places[from].node.marks.entry(to as u32).or_default();
                    marks.acknowledged(durable, head);
                }
                Some(Message::Plain(after, plain_upto)) => {
                    connection.outgoing.rewind(after, plain_upto);
                    connection.forth.push_back(Message::Again);
                    return true;
                }
                _ => return false,
            }
        };
        let have = self.places[from].node.has(&want);
        connection.forth.push_back(Message::Content { want, have });
        true
    }

    pub(crate) fn drain_logs(&mut self) {
        for (at, place) in self.places.iter_mut().enumerate() {
            self.trace.take(at, &mut place.node.log);
        }
    }

    /// Everything comes up, connects and talks until nothing changes.
    fn heal(&mut self) -> Result<(), String> {
        self.trace.say(|| "--- heal".into());
        for at in 0..self.places.len() {
            self.start(at);
            self.rescan(at);
        }
        let small = self.rng.chance(50);
        let mut quiet = 0;
        for round in 0..ROUNDS {
            self.users.now_ns += 1_000_000_000;
            let mut moved = false;
            for (from, to) in self.links.clone() {
                self.connect(from, to);
                let limit = if small && self.rng.chance(70) {
                    1 + self.rng.below(3) as usize
                } else {
                    1000
                };
                moved |= self.send(from, to, limit);
            }
            for at in 0..self.places.len() {
                self.places[at].node.commit();
                if self.rng.chance(20) {
                    self.sweep(at);
                }
            }
            for (from, to) in self.links.clone() {
                if self.rng.chance(20) {
                    self.acknowledge_on((from, to));
                }
                while self.back(from, to) {
                    moved = true;
                }
                while self.forth(from, to, false) {
                    moved = true;
                }
            }
            for at in 0..self.places.len() {
                // A crash in here would mean another round of starting.
                self.settle(at, false);
                self.start(at);
                let events = std::mem::take(&mut self.places[at].events);
                let place = &mut self.places[at];
                moved |= !events.is_empty() || place.lost || !place.node.pending.is_empty();
                moved |= !place.node.dirty.is_empty();
                place.node.dirty.extend(events);
                if place.lost {
                    self.rescan(at);
                }
            }
            self.drain_logs();
            // What a round's end leaves, the next but one sends.
            quiet = if moved { 0 } else { quiet + 1 };
            if quiet == 3 {
                self.trace.say(|| format!("--- quiet after {round} rounds"));
                self.users.moved.clear();
                return Ok(());
            }
        }
        let waits: Vec<String> = self
            .places
            .iter()
            .map(|place| format!("{:?}", place.node.pending.keys()))
            .collect();
        Err(format!("still talking after {ROUNDS} rounds; pending: {waits:?}"))
    }

    /// No index ever has a live path whose parent is no live directory.
    fn check_whole(&mut self) -> Result<(), String> {
        for (at, place) in self.places.iter_mut().enumerate() {
            // Rows that change take other numbers.
            if std::mem::replace(&mut place.whole, place.node.index.head()) == place.node.index.head() {
                continue;
            }
            for (path, record) in &*place.node.index.records {
                let parent = if record.row.deleted { None } else { path.parent() };
                let Some(parent) = parent else { continue };
                let above = place.node.index.get(&parent);
                if !parent.is_root() && !above.is_some_and(|record| record.row.is_live_dir()) {
                    return Err(format!(
                        "n{at} has {path} but not the directory {parent} in its index"
                    ));
                }
            }
        }
        Ok(())
    }

    /// At rest, with all links up, nobody remembers a deletion for long.
    fn check_forgotten(&mut self) -> Result<(), String> {
        for _ in 0..2 {
            self.acknowledge_all();
        }
        for (at, place) in self.places.iter().enumerate() {
            let kept = place
                .node
                .index
                .records
                .iter()
                .find(|(_, record)| record.row.deleted);
            if let Some((path, record)) = kept {
                return Err(format!(
                    "n{at} keeps {} for ever: {:?}",
                    shown(path, &record.row),
                    place.node.marks
                ));
            }
        }
        Ok(())
    }

    /// Everybody connects, talks, tells how far it is, and forgets what it may.
    fn acknowledge_all(&mut self) {
        // What is told goes all the way round before anybody forgets it, as it
        // does where nodes forget only when they have been idle for long.
        for _ in 0..2 * self.places.len() {
            let mut moved = false;
            for (from, to) in self.links.clone() {
                self.connect(from, to);
                moved |= self.send(from, to, 1000);
                while self.forth(from, to, false) {}
            }
            for at in 0..self.places.len() {
                self.settle(at, false);
                self.places[at].node.commit();
            }
            if !moved {
                break;
            }
        }
        for (from, to) in self.links.clone() {
            self.acknowledge_on((from, to));
            while self.back(from, to) {}
        }
        for at in 0..self.places.len() {
            self.sweep(at);
        }
    }

    fn check(&mut self) -> Result<(), String> {
        self.check_whole()?;
        let first = self.places[0].node.disk.picture();
        for (at, place) in self.places.iter().enumerate() {
            let picture = place.node.disk.picture();
            for path in first.0.keys().chain(picture.0.keys()) {
                if first.0.get(path) != picture.0.get(path) {
                    return Err(format!(
                        "trees differ at {path}: n0 {:?}, n{at} {:?}",
                        first.0.get(path),
                        picture.0.get(path)
                    ));
                }
            }
            if first.1 != picture.1 {
                return Err(format!(
                    "hard links differ: n0 {:?}, n{at} {:?}",
                    first.1, picture.1
                ));
            }
            let rows = &self.places[0].node.index.records;
            let others = &place.node.index.records;
            for path in rows.keys().chain(others.keys()) {
                let (a, b) = (rows.get(path).map(Arc::as_ref), others.get(path).map(Arc::as_ref));
                // Tombstones are forgotten where their work is done, and a node
                // that came late need not have any.
                let row = |record: Option<&Record>| {
                    record.map(|record| record.row.clone()).filter(|row| !row.deleted)
                };
                if row(a) != row(b) {
                    let show = |record: Option<&Record>| record.map(|record| shown(path, &record.row));
                    return Err(format!(
                        "rows differ at {path}: n0 {:?}, n{at} {:?}",
                        show(a),
                        show(b)
                    ));
                }
            }
            for (path, record) in &**others {
                let here = place.node.disk.entry(path);
                let says = record.row.live().map(|entry| Entry {
                    link: None,
                    ..entry.clone()
                });
                if here != says.as_ref() {
                    return Err(format!(
                        "n{at}: the index says {says:?} at {path}, there is {here:?}"
                    ));
                }
            }
        }
        self.check_contents()?;
        self.check_at_rest()
    }

    /// Nothing that a user wrote is gone but what a user replaced.
    fn check_contents(&self) -> Result<(), String> {
        let picture = &self.places[0].node.disk;
        let held: Vec<Kind> = picture.contents().into_values().collect();
        if self.policy == Policy::KeepBoth {
            let gone = self
                .users
                .written
                .iter()
                .filter(|(kind, _)| !self.users.removed.contains(kind) && !held.contains(kind))
                .map(|(kind, who)| format!("{kind:?}, written to {who}, is gone"));
            // The same one each time.
            if let Some(gone) = gone.min() {
                return Err(gone);
            }
        }
        if self.manner != Manner::Free
            && let Some(copy) = picture
                .names
                .keys()
                .find(|path| path.to_string().contains("conflict"))
        {
            return Err(format!("{copy} is a conflict copy, but nothing conflicted"));
        }
        self.check_authors()
    }

    /// Where nothing can conflict, only the nodes whose users change things
    /// make rows, and the others just take them.
    fn check_authors(&self) -> Result<(), String> {
        if self.manner == Manner::Free {
            return Ok(());
        }
        for (path, record) in &*self.places[0].node.index.records {
            let may = |at: usize| match self.manner {
                Manner::Free => true,
                Manner::OneWriter => at == 0 || path.is_root(),
                Manner::Apart => path.is_within(&self.homes[at]) || path.is_root(),
            };
            let author = record.row.version.stamp.replica;
            // The root is there before anything else, perhaps in another life.
            if !(0..self.places.len()).any(|at| may(at) && name_of(author) == format!("n{at}")) {
                return Err(format!(
                    "a node made a row without need: {}",
                    shown(path, &record.row)
                ));
            }
        }
        Ok(())
    }

    /// Looking at everything again finds nothing new, and nothing is sent.
    fn check_at_rest(&mut self) -> Result<(), String> {
        for at in 0..self.places.len() {
            let before = self.places[at].node.index.records.clone();
            self.stop(at);
            self.start(at);
            let after = &self.places[at].node.index.records;
            for (path, record) in &**after {
                if before.get(path).map(|record| &record.row) != Some(&record.row) {
                    return Err(format!(
                        "n{at}: a restart with nothing to do makes {}",
                        shown(path, &record.row)
                    ));
                }
            }
        }
        Ok(())
    }

    /// What the users left where nothing can conflict: path and entry, the root
    /// aside, which every node has had from the beginning.
    fn left(&self, homes: &[RelPath]) -> BTreeMap<RelPath, Entry> {
        let mut left = BTreeMap::new();
        for (at, place) in self.places.iter().enumerate() {
            let mine = |path: &RelPath| match self.manner {
                Manner::Free => false,
                Manner::OneWriter => at == 0 && !path.is_root(),
                Manner::Apart => path.is_within(&homes[at]),
            };
            left.extend(
                place
                    .node
                    .disk
                    .picture()
                    .0
                    .into_iter()
                    .filter(|(path, _)| mine(path)),
            );
        }
        left
    }

    fn check_left(&self, left: &BTreeMap<RelPath, Entry>) -> Result<(), String> {
        if self.manner == Manner::Free {
            return Ok(());
        }
        let mut now = self.places[0].node.disk.picture().0;
        now.remove(&RelPath::root());
        for path in left.keys().chain(now.keys()) {
            if left.get(path) != now.get(path) {
                let (left, now) = (left.get(path), now.get(path));
                return Err(format!(
                    "{path} is not as its only users left it: {left:?}, now {now:?}"
                ));
            }
        }
        Ok(())
    }
}
