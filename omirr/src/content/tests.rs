//! Both ends of a transfer together.

use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};

use bytes::Bytes;
use proptest::prelude::*;

use super::send::GROUP_BYTES;
use super::*;
use crate::model::Hash;
use crate::wire::Part;

const MIB: usize = 1 << 20;

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut noise);
    noise
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn groups(source: impl Source, size: u64, hash: Hash, have: &[ChunkId]) -> Result<Vec<Vec<Part>>, SendError> {
    let mut groups = Vec::new();
    let mut ended = false;
    send_content(source, size, Some(hash), have, |parts, last| {
        assert!(!ended, "nothing follows the last group");
        ended = last;
        let data = parts
            .iter()
            .map(|part| {
                if let Part::Data(data) = part {
                    data.len()
                } else {
                    0
                }
            })
            .sum::<usize>();
        assert!(data <= GROUP_BYTES);
        groups.push(parts);
        ControlFlow::Continue(())
    })?;
    assert!(ended, "the last group is marked");
    Ok(groups)
}

fn data_bytes(groups: &[Vec<Part>]) -> usize {
    groups
        .iter()
        .flatten()
        .map(|part| {
            if let Part::Data(data) = part {
                data.len()
            } else {
                0
            }
        })
        .sum()
}

fn hole_bytes(groups: &[Vec<Part>]) -> u64 {
    groups
        .iter()
        .flatten()
        .map(|part| if let Part::Hole(bytes) = part { *bytes } else { 0 })
        .sum()
}

fn assemble(
    groups: &[Vec<Part>],
    bytes: u64,
    hash: Hash,
    own: Option<OwnChunks>,
) -> Result<Vec<u8>, AssembleError> {
    let mut assembler = Assembler::new(Vec::new(), bytes, hash, own)?;
    for group in groups {
        assembler.take(group)?;
    }
    assembler.finish()
}

/// Sends `new` to a receiver that has `old`; returns the bytes of data sent.
fn transfer(old: Option<&[u8]>, new: &[u8]) -> usize {
    let (size, hash) = (new.len() as u64, hash_bytes(new));
    let own = old.map(|old| {
        let chunks = chunk_list(old, ChunkSize::for_file(size), usize::MAX).unwrap();
        OwnChunks::new(file_of(old), chunks)
    });
    let have = own.as_ref().map(OwnChunks::ids).unwrap_or_default();
    let groups = groups(new, size, hash, &have).unwrap();
    assert!(
        assemble(&groups, size, hash, own).unwrap() == new,
        "the content differs"
    );
    data_bytes(&groups)
}

#[test]
fn content_arrives_whole_at_every_size() {
    let bytes = noise(1, 3 * MIB + 1);
    for size in [0, 1, 4095, 65_536, MIB - 1, MIB, MIB + 1, 2 * MIB, 3 * MIB + 1] {
        assert_eq!(transfer(None, &bytes[..size]), size);
        assert!(transfer(Some(b"else"), &bytes[..size]) == size);
    }
}

#[test]
fn nothing_is_sent_of_what_the_receiver_has() {
    let bytes = noise(2, 4 * MIB);
    assert_eq!(transfer(Some(&bytes), &bytes), 0);
}

#[test]
fn chunks_cover_the_file_and_are_of_the_promised_size() {
    let bytes = noise(3, 8 * MIB);
    let chunks = chunk_list(&bytes[..], ChunkSize::for_file(8 << 20), usize::MAX).unwrap();
    let mut at = 0;
    for (place, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk.offset, at);
        assert!(chunk.len as usize <= 256 << 10);
        assert!(chunk.len as usize >= 16 << 10 || place == chunks.len() - 1);
        at += u64::from(chunk.len);
    }
    assert_eq!(at, 8 << 20);
    assert!(
        (60..260).contains(&chunks.len()),
        "{} chunks of 8 MiB",
        chunks.len()
    );
    let first = chunk_list(&bytes[..], ChunkSize::for_file(8 << 20), 5).unwrap();
    assert_eq!(first, chunks[..5]);
}

#[test]
fn the_cuts_do_not_depend_on_how_much_a_read_yields() {
    struct Drip<'a>(&'a [u8], usize);
    impl Source for Drip<'_> {
        fn read_at(&mut self, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
            self.1 = self.1 * 31 % 70_001 + 1;
            let most = self.1.min(buffer.len());
            self.0.read_at(&mut buffer[..most], at)
        }
    }
    let bytes = noise(4, 5 * MIB);
    let size = ChunkSize::for_file(bytes.len() as u64);
    let at_once = chunk_list(&bytes[..], size, usize::MAX).unwrap();
    assert_eq!(chunk_list(Drip(&bytes, 1), size, usize::MAX).unwrap(), at_once);
}

#[test]
fn a_hole_of_a_terabyte_is_neither_read_nor_sent() {
    let sparse = |middle: &[u8]| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        file.write_all_at(middle, 1 << 39).unwrap();
        file.write_all_at(b"last", (1 << 40) - 4).unwrap();
        file
    };
    let was = sparse(&noise(5, 4 * MIB));
    let mut changed = noise(5, 4 * MIB);
    changed[2 * MIB] ^= 1;
    let is = sparse(&changed);
    // A read of it all would take minutes.
    let started = std::time::Instant::now();
    let (size, hash) = hash_file(&is).unwrap();
    assert_eq!(size, 1 << 40);
    let average = ChunkSize::for_file(size);
    let have = chunk_list(&was, average, usize::MAX).unwrap();
    for have in [&[][..], &have] {
        let own = OwnChunks::new(was.try_clone().unwrap(), have.to_vec());
        let ids = own.ids();
        let target = tempfile::tempfile().unwrap();
        let mut assembler = Assembler::new(&target, size, hash, Some(own)).unwrap();
        for group in groups(&is, size, hash, &ids).unwrap() {
            assembler.take(&group).unwrap();
        }
        assembler.finish().unwrap();
        assert!(target.metadata().unwrap().blocks() * 512 < 64 << 20);
        assert_eq!(hash_file(&target).unwrap(), (size, hash));
    }
    assert!(
        started.elapsed() < std::time::Duration::from_secs(60),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn large_files_have_no_more_chunks_than_a_message_can_name() {
    for shift in 0..39 {
        let average = ChunkSize::for_file(1 << shift).average as u64;
        // Twice as many as expected is more than chance brings about.
        assert!(
            (1u64 << shift) / average <= crate::wire::MAX_HAVE as u64 / 2,
            "2^{shift} bytes"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn few_edits_cost_little(
        seed in any::<u64>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..2000, 0usize..2000), 0..6),
    ) {
        let old = noise(seed, 4 * MIB);
        let mut new = old.clone();
        for (count, (at, removed, inserted)) in edits.iter().enumerate() {
            let at = at.index(new.len());
            let end = (at + removed).min(new.len());
            new.splice(at..end, noise(count as u64, *inserted));
        }
        // An edit costs the chunks that it touches, and at times the next one.
        let sent = transfer(Some(&old), &new);
        prop_assert!(sent <= edits.len() * 3 * (256 << 10), "{} edits cost {sent} bytes", edits.len());
    }

    #[test]
    fn zeros_and_noise_mix(
        runs in prop::collection::vec((any::<bool>(), 1usize..300_000), 0..12),
        with_old in any::<bool>(),
    ) {
        let mut bytes = Vec::new();
        for (count, (zeros, len)) in runs.iter().enumerate() {
            bytes.extend(if *zeros { vec![0; *len] } else { noise(count as u64, *len) });
        }
        let half = bytes[bytes.len() / 2..].to_vec();
        transfer(with_old.then_some(&half[..]), &bytes);
    }

    #[test]
    fn parts_of_any_kind_never_panic(
        parts in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..50).prop_map(|data| Part::Data(Bytes::from(data))),
            (0u32..4).prop_map(Part::Have),
            (0u64..90).prop_map(Part::Hole),
            (u64::MAX - 3..=u64::MAX).prop_map(Part::Hole),
        ], 0..8),
    ) {
        let chunks = chunk_list(&b"what this node has"[..], ChunkSize::for_file(1), 9).unwrap();
        let own = OwnChunks::new(file_of(b"what this node has"), chunks);
        let outcome = assemble(&[parts], 100, Hash([0; 32]), Some(own));
        prop_assert!(outcome.is_err());
    }
}

#[test]
fn zeros_travel_as_holes() {
    let mut bytes = vec![0; 8 * MIB];
    bytes[5 * MIB + 7] = 1;
    let groups = groups(&bytes[..], bytes.len() as u64, hash_bytes(&bytes), &[]).unwrap();
    assert_eq!(data_bytes(&groups), HOLE_BYTES);
    assert_eq!(hole_bytes(&groups), (8 * MIB - HOLE_BYTES) as u64);
    assert_eq!(groups.len(), 1);
    assert!(assemble(&groups, bytes.len() as u64, hash_bytes(&bytes), None).unwrap() == bytes);
    assert_eq!(transfer(Some(&noise(5, MIB)), &bytes[..5 * MIB]), 0);
}

#[test]
fn sparse_files_stay_sparse_and_are_not_read() {
    let size = 256u64 << 20;
    let from = tempfile::tempfile().unwrap();
    from.set_len(size).unwrap();
    from.write_all_at(b"in the middle", size / 2 + 100).unwrap();
    let (hashed_bytes, hash) = hash_file(&from).unwrap();
    assert_eq!(hashed_bytes, size);

    let parts = groups(&from, size, hash, &[]).unwrap();
    assert!(data_bytes(&parts) <= 256 << 10);
    let to = tempfile::tempfile().unwrap();
    let mut assembler = Assembler::new(&to, size, hash, None).unwrap();
    for group in &parts {
        assembler.take(group).unwrap();
    }
    assembler.finish().unwrap();
    let there = to.metadata().unwrap();
    assert_eq!(there.len(), size);
    assert!(there.blocks() * 512 <= 1 << 20, "{} blocks", there.blocks());
    let mut middle = [0; 13];
    to.read_exact_at(&mut middle, size / 2 + 100).unwrap();
    assert_eq!(&middle, b"in the middle");
}

#[test]
fn a_file_hashes_as_its_bytes_do() {
    for size in [0, 1, 1000, 256 << 10, (256 << 10) + 1, 3 * MIB + 5] {
        let bytes = noise(6, size);
        assert_eq!(
            hash_file(&file_of(&bytes)).unwrap(),
            (size as u64, hash_bytes(&bytes)),
            "{size} bytes"
        );
    }
    // A hole behind the first buffer, and one at the end.
    let mut bytes = noise(7, 5 * MIB);
    bytes[MIB..3 * MIB].fill(0);
    bytes[4 * MIB..].fill(0);
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    file.write_all_at(&bytes[..MIB], 0).unwrap();
    file.write_all_at(&bytes[3 * MIB..4 * MIB], 3 * MIB as u64)
        .unwrap();
    assert_eq!(
        hash_file(&file).unwrap(),
        (bytes.len() as u64, hash_bytes(&bytes))
    );
}

#[test]
fn a_file_that_changes_is_never_sent_to_its_end() {
    let bytes = noise(8, 3 * MIB);
    let hash = hash_bytes(&bytes);
    let size = bytes.len() as u64;
    let mut other = bytes.clone();
    other[2 * MIB] ^= 1;
    let longer = noise(8, 3 * MIB + 1);
    for have in [&[][..], &[[0; 16]]] {
        for now in [&other[..], &longer[..], &bytes[..2 * MIB]] {
            let mut last_seen = false;
            let outcome = send_content(now, size, Some(hash), have, |_, last| {
                last_seen |= last;
                ControlFlow::Continue(())
            });
            assert!(matches!(outcome, Err(SendError::Changed { .. })), "{outcome:?}");
            assert!(!last_seen);
            // Without a hash the size alone is looked at: the rest is the receiver's.
            let outcome = send_content(now, size, None, have, |_, _| ControlFlow::Continue(()));
            assert_eq!(outcome.is_ok(), now.len() == bytes.len(), "{outcome:?}");
        }
    }
}

#[test]
fn sending_stops_when_it_is_told_to() {
    let bytes = noise(9, 5 * MIB);
    let mut count = 0;
    let outcome = send_content(&bytes[..], bytes.len() as u64, None, &[], |_, _| {
        count += 1;
        ControlFlow::Break(())
    });
    assert!(matches!(outcome, Err(SendError::Stopped)));
    assert_eq!(count, 1);
}

#[test]
fn parts_that_cannot_be_are_refused() {
    let own = || {
        OwnChunks::new(
            file_of(b"own"),
            chunk_list(&b"own"[..], ChunkSize::for_file(3), 9).unwrap(),
        )
    };
    let hash = hash_bytes(b"own");
    let said = |parts: Vec<Part>, own| assemble(&[parts], 3, hash, own).unwrap_err().to_string();
    let data = |text: &'static str| Part::Data(Bytes::from_static(text.as_bytes()));
    assert_eq!(
        said(vec![Part::Have(1)], Some(own())),
        "a reference to chunk 1 of 1 that this node has"
    );
    assert_eq!(
        said(vec![Part::Have(0)], None),
        "a reference to chunk 0 of 0 that this node has"
    );
    assert_eq!(
        said(vec![data("four")], None),
        "content of more than the announced 3 bytes"
    );
    assert_eq!(
        said(vec![Part::Hole(u64::MAX), Part::Hole(2)], None),
        "content of more than the announced 3 bytes"
    );
    assert_eq!(
        said(vec![data("ow")], None),
        "2 bytes of content, 3 were announced"
    );
    assert!(said(vec![data("one")], None).contains("was announced"));
    assert_eq!(
        assemble(&[vec![Part::Have(0)]], 3, hash, Some(own())).unwrap(),
        b"own"
    );

    // The file behind the chunks was cut short meanwhile.
    let file = file_of(b"own");
    let chunks = chunk_list(&b"own"[..], ChunkSize::for_file(3), 9).unwrap();
    file.set_len(1).unwrap();
    let said = said(vec![Part::Have(0)], Some(OwnChunks::new(file, chunks)));
    assert_eq!(said, "what this node had of it changed meanwhile");
}
