//! Real files on the disk's filesystem and on tmpfs.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::model::{Entry, Flags, Here, Kind, RelPath, Xattr};
use crate::observe::{Observed, Reading, observe, scan, stat};

/// One fresh tree on each filesystem: the one of the temporary folder (ext4 on
/// most machines) and tmpfs.
fn on_each_filesystem(test: impl Fn(&Path)) {
    for base in [std::env::temp_dir(), PathBuf::from("/dev/shm")] {
        let folder = tempfile::tempdir_in(&base).unwrap();
        println!("on {}", base.display());
        test(folder.path());
    }
}

fn rel(path: &str) -> RelPath {
    RelPath::new(path.as_bytes()).unwrap()
}

fn root(path: &Path) -> ShareRoot {
    ShareRoot::open(path).unwrap()
}

/// What is at `path`, which must hold still.
fn present(dirs: &Dirs<'_>, path: &RelPath) -> (Entry, StatSig) {
    match observe(dirs, path, None, Reading::IfChanged).unwrap() {
        Observed::Present { entry, sig, .. } => (entry, sig),
        other => panic!("{path}: {other:?}"),
    }
}

fn sig(dirs: &Dirs<'_>, path: &RelPath) -> StatSig {
    stat(dirs, path).unwrap().unwrap()
}

fn file_entry(content: &[u8]) -> Entry {
    Entry {
        kind: Kind::File {
            size: content.len() as u64,
            hash: crate::content::hash_bytes(content),
        },
        mode: 0o640,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        mtime: Time {
            secs: 1_234_567_890,
            nanos: 123_456_789,
        },
        xattrs: Vec::new(),
        flags: Flags::NONE,
        user: None,
        group: None,
        link: None,
    }
}

fn put(dirs: &Dirs<'_>, path: &RelPath, content: &[u8], expect: &Expect) -> Result<Applied, ApplyError> {
    let mut staged = stage_file(dirs, path, &file_entry(content))?;
    staged.append(content)?;
    install(dirs, staged.finish(&file_entry(content))?, expect)
}

/// Writes what `entry` says to `path`, as the daemon would, taking content from
/// the file `from`.
fn write(dirs: &Dirs<'_>, path: &RelPath, entry: &Entry, from: &RelPath) -> StatSig {
    let absent = Expect::Absent;
    let applied = match &entry.kind {
        Kind::File { .. } => {
            let staged = clone_local(dirs, from, &sig(dirs, from), path, entry).unwrap();
            install(dirs, staged.finish(entry).unwrap(), &absent)
        }
        Kind::Directory => make_dir(dirs, path, entry, &absent),
        Kind::Symlink { .. } => make_symlink(dirs, path, entry, &absent),
        _ => make_node(dirs, path, entry, &absent),
    };
    applied.unwrap().sig().expect("nobody else writes here")
}

fn no_leftovers(share: &ShareRoot) {
    let summary = scan(share, &RelPath::root(), &|_, _| false, || (), |_, ()| {}).unwrap();
    assert_eq!(summary.leftovers, []);
    assert_eq!(summary.unseen, []);
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: only root may chown and make devices");
    }
    root
}

#[test]
fn every_kind_comes_out_as_it_went_in() {
    if !is_root() {
        return;
    }
    on_each_filesystem(|path| {
        let run = |command: &str| {
            let status = Command::new("sh")
                .arg("-ec")
                .arg(command)
                .current_dir(path)
                .status()
                .unwrap();
            assert!(status.success(), "{command}");
        };
        let long = "n".repeat(255);
        run("mkdir in out
             printf hello > in/file; chown 1234:5678 in/file; chmod 4751 in/file
             printf acl > in/acl; setfacl -m u:1234:r,g:99:rw in/acl
             setfattr -n trusted.t -v secret in/acl
             printf cap > in/cap; chmod 755 in/cap; chown 7:8 in/cap
             setfattr -n security.capability -v 0x0100000200000000000000000000000000000000 in/cap
             : > in/empty; chmod 0 in/empty
             ln -s 'to nowhere' in/link; chown -h 42:43 in/link; setfattr -h -n trusted.s -v 1 in/link
             mkdir in/dir; chmod 3775 in/dir; chown 9:10 in/dir; setfacl -d -m u:77:rwx in/dir
             mkfifo -m 622 in/fifo
             mknod in/char c 5 77; mknod in/block b 250 3
             touch -h -d '1969-12-31 12:00:00.000000001 UTC' in/link
             touch -d '2031-02-03 04:05:06.987654321 UTC' in/file in/dir in/fifo in/char");
        fs::write(path.join("in").join(&long), "long").unwrap();
        fs::write(
            path.join("in")
                .join(std::ffi::OsStr::from_bytes(b"caf\xe9\n\x1b")),
            "odd",
        )
        .unwrap();
        drop(std::os::unix::net::UnixListener::bind(path.join("in/socket")).unwrap());
        let has_user_xattrs = rustix::fs::setxattr(
            path.join("in/acl"),
            "user.u",
            &[7; 2000],
            rustix::fs::XattrFlags::empty(),
        )
        .is_ok();

        let share = root(path);
        let dirs = share.batch();
        let mut count = 0;
        for child in fs::read_dir(path.join("in")).unwrap() {
            let name = child.unwrap().file_name();
            let (from, to) = (
                rel("in").join(name.as_bytes()).unwrap(),
                rel("out").join(name.as_bytes()).unwrap(),
            );
            let (entry, _) = present(&dirs, &from);
            let written = write(&dirs, &to, &entry, &from);
            let (again, sig) = present(&dirs, &to);
            assert_eq!(again, entry, "{from}");
            assert!(sig.same_as(&written), "{from}: {sig:?} {written:?}");
            count += 1;
        }
        assert_eq!(count, 12);
        let (acl, _) = present(&dirs, &rel("out/acl"));
        let names: Vec<_> = acl
            .xattrs
            .iter()
            .map(|x| String::from_utf8_lossy(&x.name).into_owned())
            .collect();
        assert_eq!(names[..2], ["system.posix_acl_access", "trusted.t"]);
        assert_eq!(names.len(), if has_user_xattrs { 3 } else { 2 });
        assert_eq!(
            fs::metadata(path.join("out/file")).unwrap().mode() & 0o7777,
            0o4751
        );
        assert_eq!(
            present(&dirs, &rel("out/dir")).0.xattrs[0].name[..],
            *b"system.posix_acl_default"
        );
        assert_eq!(
            present(&dirs, &rel("out/cap")).0.xattrs[0].name[..],
            *b"security.capability"
        );
        no_leftovers(&share);
    });
}

#[test]
fn attributes_change_without_the_content() {
    if !is_root() {
        return;
    }
    on_each_filesystem(|path| {
        let share = root(path);
        let dirs = share.batch();
        fs::write(path.join("file"), "content").unwrap();
        fs::create_dir(path.join("dir")).unwrap();
        symlink("x", path.join("link")).unwrap();
        let acl = Command::new("setfacl")
            .args(["-m", "u:5:rwx"])
            .arg(path.join("file"))
            .status()
            .unwrap();
        assert!(acl.success());
        for name in ["file", "dir", "link"] {
            let name = rel(name);
            let (mut entry, before) = present(&dirs, &name);
            entry.uid = 11;
            entry.gid = 12;
            entry.mtime = Time {
                secs: 77,
                nanos: 999_999_999,
            };
            entry.xattrs = vec![Xattr {
                name: (*b"trusted.new").into(),
                value: (*b"value").into(),
            }];
            if !matches!(entry.kind, Kind::Symlink { .. }) {
                entry.mode = 0o6511;
            }
            let applied = set_attrs(&dirs, &name, &entry, &before).unwrap();
            let (after, sig) = present(&dirs, &name);
            assert_eq!(after, entry, "{name}");
            assert!(applied.sig().unwrap().same_as(&sig), "{name}");
            if name != rel("dir") {
                assert!(
                    set_attrs(&dirs, &name, &entry, &before).unwrap_err().is_changed(),
                    "{name}"
                );
            }
            // The other way: everything can be taken off again.
            entry.xattrs.clear();
            entry.uid = 0;
            let sig = sig
                .same_as(&stat(&dirs, &name).unwrap().unwrap())
                .then_some(sig)
                .unwrap();
            _ = set_attrs(&dirs, &name, &entry, &sig).unwrap();
            assert_eq!(present(&dirs, &name).0, entry, "{name}");
        }
        let mtime = Time { secs: -5, nanos: 5 };
        fs::write(path.join("dir/child"), "").unwrap();
        let before = crate::observe::stat(&dirs, &rel("dir")).unwrap().unwrap();
        let sig = set_dir_time(&dirs, &rel("dir"), mtime, &before).unwrap();
        assert_eq!(sig.mtime, mtime);
        assert_eq!(present(&dirs, &rel("dir")).0.mtime, mtime);
    });
}

#[test]
fn a_new_file_does_not_inherit_what_its_entry_lacks() {
    on_each_filesystem(|path| {
        let status = Command::new("setfacl")
            .args(["-d", "-m", "u:77:rwx"])
            .arg(path)
            .status()
            .unwrap();
        assert!(status.success());
        let share = root(path);
        let dirs = share.batch();
        _ = put(&dirs, &rel("file"), b"x", &Expect::Absent).unwrap();
        assert_eq!(present(&dirs, &rel("file")).0, file_entry(b"x"));
        let dir = Entry {
            kind: Kind::Directory,
            ..file_entry(b"")
        };
        _ = make_dir(&dirs, &rel("dir"), &dir, &Expect::Absent).unwrap();
        assert_eq!(present(&dirs, &rel("dir")).0, dir);
    });
}

#[test]
fn holes_stay_holes() {
    on_each_filesystem(|path| {
        let share = root(path);
        let dirs = share.batch();
        let mut whole = vec![0; 8 << 20];
        whole[4 << 20..(4 << 20) + 5].copy_from_slice(b"inner");
        let mut staged = stage_file(&dirs, &rel("sparse"), &file_entry(&whole)).unwrap();
        staged.hole(4 << 20).unwrap();
        staged.append(b"inner").unwrap();
        staged.hole((4 << 20) - 5).unwrap();
        let ready = staged.finish(&file_entry(&whole)).unwrap();
        _ = install(&dirs, ready, &Expect::Absent).unwrap();
        let from = rel("sparse");
        let copy = clone_local(
            &dirs,
            &from,
            &sig(&dirs, &from),
            &rel("copy"),
            &file_entry(&whole),
        )
        .unwrap();
        _ = install(&dirs, copy.finish(&file_entry(&whole)).unwrap(), &Expect::Absent).unwrap();
        for name in ["sparse", "copy"] {
            assert_eq!(present(&dirs, &rel(name)).0, file_entry(&whole));
            let meta = fs::metadata(path.join(name)).unwrap();
            assert_eq!(meta.len(), 8 << 20);
            assert!(
                meta.blocks() * 512 <= 64 << 10,
                "{name} takes {} blocks",
                meta.blocks()
            );
        }
    });
}

#[test]
fn content_that_was_not_announced_is_not_installed() {
    on_each_filesystem(|path| {
        let share = root(path);
        let dirs = share.batch();
        let mut short = stage_file(&dirs, &rel("f"), &file_entry(b"")).unwrap();
        short.append(b"hell").unwrap();
        assert!(matches!(
            short.finish(&file_entry(b"hello")),
            Err(ApplyError::Content { actual_size: 4, .. })
        ));
        // Out of order, so it is read back.
        let mut pieces = stage_file(&dirs, &rel("f"), &file_entry(b"")).unwrap();
        pieces.write_at(3, b"lo").unwrap();
        pieces.write_at(0, b"hel").unwrap();
        let ready = pieces.finish(&file_entry(b"hello")).unwrap();
        assert!(sync_batch(&share, &[&ready]).is_empty());
        _ = install(&dirs, ready, &Expect::Absent).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let paths = [RelPath::root(), rel("f"), rel("gone/x")];
        assert!(sync_each(&dirs, &paths, &[rel("gone")], runtime.handle()).unwrap());
        assert_eq!(fs::read(path.join("f")).unwrap(), b"hello");
        let mut wrong = stage_file(&dirs, &rel("g"), &file_entry(b"")).unwrap();
        wrong.write_at(0, b"hellx").unwrap();
        assert!(matches!(
            wrong.finish(&file_entry(b"hello")),
            Err(ApplyError::Content { .. })
        ));
        assert!(!path.join("g").exists());
        no_leftovers(&share);
    });
}

#[test]
fn a_filesystem_without_nameless_files_works_too() {
    on_each_filesystem(|path| {
        let share = root(path);
        share.tmpfile_unsupported();
        let dirs = share.batch();
        let staged = stage_file(&dirs, &rel("dropped"), &file_entry(b"")).unwrap();
        assert_eq!(fs::read_dir(path).unwrap().count(), 1);
        drop(staged);
        assert_eq!(fs::read_dir(path).unwrap().count(), 0);
        let first = put(&dirs, &rel("f"), b"one", &Expect::Absent)
            .unwrap()
            .sig()
            .unwrap();
        assert!(
            put(&dirs, &rel("f"), b"two", &Expect::Absent)
                .unwrap_err()
                .is_changed()
        );
        _ = put(&dirs, &rel("f"), b"two", &Expect::Sig(first)).unwrap();
        assert_eq!(fs::read(path.join("f")).unwrap(), b"two");
        no_leftovers(&share);
    });
}

#[test]
fn a_faster_user_loses_nothing() {
    on_each_filesystem(|path| {
        let share = root(path);
        let dirs = share.batch();
        let f = rel("f");
        let refused = |result: Result<Applied, ApplyError>| {
            let error = result.unwrap_err();
            assert_eq!(error, ApplyError::Changed { path: rel("f") });
            assert!(error.is_transient());
        };
        fs::write(path.join("f"), "user").unwrap();
        let old = sig(&dirs, &f);
        refused(put(&dirs, &f, b"peer", &Expect::Absent));
        let dir = Entry {
            kind: Kind::Directory,
            ..file_entry(b"")
        };
        refused(make_dir(&dirs, &f, &dir, &Expect::Absent));
        fs::write(path.join("f"), "user2").unwrap();
        refused(put(&dirs, &f, b"peer", &Expect::Sig(old)));
        refused(make_dir(&dirs, &f, &dir, &Expect::Sig(old)));
        refused(remove_file(&dirs, &f, &old).map(|()| Applied::ChangedSince));
        // Replaced by a file of the same size and time, as an editor does.
        let now = sig(&dirs, &f);
        fs::write(path.join("new"), "user3").unwrap();
        let time = fs::metadata(path.join("f")).unwrap().modified().unwrap();
        fs::File::open(path.join("new"))
            .unwrap()
            .set_times(fs::FileTimes::new().set_modified(time))
            .unwrap();
        fs::rename(path.join("new"), path.join("f")).unwrap();
        refused(put(&dirs, &f, b"peer", &Expect::Sig(now)));
        refused(set_attrs(&dirs, &f, &file_entry(b"user3"), &now));
        fs::write(path.join("other"), "other").unwrap();
        refused(move_entry(
            &dirs,
            &rel("other"),
            &sig(&dirs, &rel("other")),
            &f,
            &Expect::Sig(now),
        ));
        refused(move_entry(
            &dirs,
            &rel("other"),
            &sig(&dirs, &rel("other")),
            &f,
            &Expect::Absent,
        ));
        refused(link_existing(
            &dirs,
            &rel("other"),
            &sig(&dirs, &rel("other")),
            &f,
            &Expect::Sig(now),
        ));
        refused(link_existing(
            &dirs,
            &rel("other"),
            &sig(&dirs, &rel("other")),
            &f,
            &Expect::Absent,
        ));
        assert_eq!(
            set_aside(&dirs, &rel("other"), &f).unwrap_err(),
            ApplyError::Changed { path: f.clone() }
        );
        assert_eq!(fs::read(path.join("f")).unwrap(), b"user3");
        assert_eq!(fs::read(path.join("other")).unwrap(), b"other");
        fs::remove_file(path.join("f")).unwrap();
        refused(put(&dirs, &f, b"peer", &Expect::Sig(now)));
        no_leftovers(&share);
    });
}

/// The look before the exchange cannot see what happens after it; the second
/// look must, and must give each version of the user's back, also while the
/// user goes on.
#[test]
fn only_what_was_expected_is_ever_displaced() {
    use std::collections::HashSet;
    use std::os::fd::AsFd;
    use std::sync::atomic::AtomicBool;

    let inode = |sig: StatSig| (sig.ino, sig.btime);
    on_each_filesystem(|path| {
        let share = root(path);
        let f = rel("f");
        let stop = AtomicBool::new(false);
        let user = || {
            let mut destroyed = HashSet::new();
            while !stop.load(Ordering::Relaxed) {
                fs::write(path.join("new"), "user").unwrap();
                let version = fs::File::open(path.join("new")).unwrap();
                let look = || crate::observe::sig_of(&crate::observe::statx_fd(version.as_fd()).unwrap());
                fs::rename(path.join("new"), path.join("f")).unwrap();
                for _ in 0..20 {
                    std::hint::spin_loop();
                }
                // Whoever has taken its last name away by now was not the user.
                if look().nlink == 0 {
                    destroyed.insert(inode(look()));
                }
            }
            destroyed
        };
        let daemon = || {
            let dirs = share.batch();
            let mut displaced = HashSet::new();
            let mut changed = 0;
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(1);
            while (displaced.len() < 300 || changed < 300) && std::time::Instant::now() < deadline {
                let Ok(Some(seen)) = stat(&dirs, &f) else { continue };
                let result = if changed % 3 == 0 {
                    remove_file(&dirs, &f, &seen)
                } else {
                    put(&dirs, &f, b"peer", &Expect::Sig(seen)).map(|_| ())
                };
                match result {
                    Ok(()) => _ = displaced.insert(inode(seen)),
                    Err(ApplyError::Changed { .. }) => changed += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            stop.store(true, Ordering::Relaxed);
            (displaced, changed)
        };
        let (destroyed, (displaced, changed)) = std::thread::scope(|scope| {
            let user = scope.spawn(user);
            let daemon = daemon();
            (user.join().unwrap(), daemon)
        });
        println!(
            "{} displaced, {changed} times the user was faster",
            displaced.len()
        );
        assert!(!displaced.is_empty());
        assert!(
            destroyed.is_subset(&displaced),
            "{:?}",
            destroyed.difference(&displaced)
        );
    });
}

#[test]
fn each_kind_replaces_each_other_kind() {
    if !is_root() {
        return;
    }
    on_each_filesystem(|path| {
        let share = root(path);
        let dirs = share.batch();
        let x = rel("x");
        let with = |kind| Entry {
            kind,
            ..file_entry(b"")
        };
        let entries = [
            file_entry(b"file"),
            with(Kind::Directory),
            Entry {
                mode: 0o777,
                ..with(Kind::Symlink {
                    target: (*b"target").into(),
                })
            },
            with(Kind::Fifo),
            with(Kind::Socket),
            with(Kind::CharDevice {
                rdev: rustix::fs::makedev(1, 3),
            }),
        ];
        let step = |entry: &Entry, expect: &Expect| match entry.kind {
            Kind::File { .. } => put(&dirs, &x, b"file", expect),
            Kind::Directory => make_dir(&dirs, &x, entry, expect),
            Kind::Symlink { .. } => make_symlink(&dirs, &x, entry, expect),
            _ => make_node(&dirs, &x, entry, expect),
        };
        let mut last = step(&entries[0], &Expect::Absent).unwrap().sig().unwrap();
        for a in &entries {
            for b in [a, &entries[0], &entries[1]] {
                last = step(b, &Expect::Sig(last)).unwrap().sig().unwrap();
                assert_eq!(present(&dirs, &x).0, *b);
            }
        }
        // Now a directory with something in it, which must stay.
        assert!(path.join("x").is_dir());
        fs::write(path.join("x/child"), "").unwrap();
        let error = step(&entries[0], &Expect::Sig(last)).unwrap_err();
        assert_eq!(error, ApplyError::NotEmpty { path: x.clone() });
        assert!(path.join("x/child").exists());
        assert_eq!(remove_dir(&dirs, &x).unwrap(), DirRemoval::NotEmpty);
        fs::remove_file(path.join("x/child")).unwrap();
        assert_eq!(remove_dir(&dirs, &x).unwrap(), DirRemoval::Removed);
        assert_eq!(remove_dir(&dirs, &x).unwrap(), DirRemoval::Absent);
        no_leftovers(&share);
    });
}

#[test]
fn nothing_leads_through_a_symlink_or_a_file() {
    on_each_filesystem(|path| {
        fs::create_dir_all(path.join("outside/real/b")).unwrap();
        fs::create_dir(path.join("share")).unwrap();
        let share = root(&path.join("share"));
        symlink("../outside/real", path.join("share/a")).unwrap();
        fs::write(path.join("share/file"), "").unwrap();
        let dirs = share.batch();
        for (victim, obstacle, component) in [
            ("a/b/x", Obstacle::Symlink, "a"),
            ("a/x", Obstacle::Symlink, "a"),
            ("file/x", Obstacle::NotDirectory, "file"),
            ("file/x/y", Obstacle::NotDirectory, "file"),
        ] {
            let expected = ApplyError::Beneath {
                path: rel(victim),
                component: rel(component),
                obstacle,
            };
            assert_eq!(
                put(&dirs, &rel(victim), b"x", &Expect::Absent).unwrap_err(),
                expected
            );
            assert_eq!(ensure_parents(&dirs, &rel(victim)).unwrap_err(), expected);
            assert!(!expected.is_transient());
            let observed = observe(&dirs, &rel(victim), None, Reading::IfChanged).unwrap();
            assert_eq!(observed, Observed::Absent);
        }
        let error = put(&dirs, &rel("a/b/x"), b"x", &Expect::Absent).unwrap_err();
        assert_eq!(error.to_string(), "refused: 'a/b/x' leads through a symlink, 'a'");
        // A symlink as the last name is neither followed nor written through.
        symlink("../outside/target", path.join("share/last")).unwrap();
        assert!(
            put(&dirs, &rel("last"), b"x", &Expect::Absent)
                .unwrap_err()
                .is_changed()
        );
        assert!(!path.join("outside/target").exists());

        // Swapped in while a batch has the directory open: it stays that
        // directory, and the next batch refuses.
        fs::create_dir(path.join("share/d")).unwrap();
        _ = put(&dirs, &rel("d/one"), b"x", &Expect::Absent).unwrap();
        fs::rename(path.join("share/d"), path.join("share/moved")).unwrap();
        symlink("../outside/real", path.join("share/d")).unwrap();
        _ = put(&dirs, &rel("d/two"), b"x", &Expect::Absent);
        let error = put(&share.batch(), &rel("d/three"), b"x", &Expect::Absent).unwrap_err();
        assert!(matches!(
            error,
            ApplyError::Beneath {
                obstacle: Obstacle::Symlink,
                ..
            }
        ));
        assert_eq!(fs::read_dir(path.join("outside/real")).unwrap().count(), 1);
    });
}

#[test]
fn own_temporary_names_are_nobodys() {
    on_each_filesystem(|path| {
        fs::write(path.join(".omirr-tmp-0123456789abcdef"), "").unwrap();
        fs::create_dir(path.join(".omirr-tmp-dir")).unwrap();
        fs::create_dir(path.join("d")).unwrap();
        fs::write(path.join("d/.omirr-tmp-x"), "").unwrap();
        let share = root(path);
        let dirs = share.batch();
        let temp = rel(".omirr-tmp-0123456789abcdef");
        assert_eq!(
            observe(&dirs, &temp, None, Reading::Always).unwrap(),
            Observed::Absent
        );
        let error = put(&dirs, &rel(".omirr-tmp-dir/x"), b"", &Expect::Absent).unwrap_err();
        assert_eq!(
            error,
            ApplyError::Reserved {
                path: rel(".omirr-tmp-dir/x")
            }
        );
        let mut seen = Vec::new();
        let summary = scan(
            &share,
            &RelPath::root(),
            &|_, _| false,
            || (),
            |dir, ()| seen.extend(dir.children),
        )
        .unwrap();
        assert_eq!(seen.len(), 1);
        assert_eq!(summary.leftovers.len(), 3);
        for leftover in &summary.leftovers {
            remove_leftover(&dirs, leftover).unwrap();
        }
        assert!(remove_leftover(&dirs, &rel("d")).is_err());
        no_leftovers(&share);
        assert!(path.join("d").is_dir());
    });
}

#[test]
fn hard_links_are_made_and_kept() {
    on_each_filesystem(|path| {
        let share = root(path);
        let dirs = share.batch();
        let first = put(&dirs, &rel("a"), b"same", &Expect::Absent)
            .unwrap()
            .sig()
            .unwrap();
        let second = link_existing(&dirs, &rel("a"), &first, &rel("b"), &Expect::Absent)
            .unwrap()
            .sig()
            .unwrap();
        assert_eq!((second.ino, second.nlink), (first.ino, 2));
        // Again, as after a crash; and in the place of another file.
        let again = link_existing(&dirs, &rel("a"), &first, &rel("b"), &Expect::Sig(second)).unwrap();
        assert_eq!(again, Applied::AsWritten(second));
        let other = put(&dirs, &rel("c"), b"other", &Expect::Absent)
            .unwrap()
            .sig()
            .unwrap();
        let third = link_existing(&dirs, &rel("b"), &first, &rel("c"), &Expect::Sig(other)).unwrap();
        assert_eq!(third.sig().unwrap().nlink, 3);
        // A symlink can have two names as well.
        symlink("t", path.join("s")).unwrap();
        let link = sig(&dirs, &rel("s"));
        _ = link_existing(&dirs, &rel("s"), &link, &rel("s2"), &Expect::Absent).unwrap();
        assert_eq!(fs::symlink_metadata(path.join("s2")).unwrap().nlink(), 2);
        // Removing one name, with the signature from before the others came:
        // that they came says nothing about this one. Another owner does.
        let mut stranger = first;
        stranger.uid += 1;
        assert!(remove_file(&dirs, &rel("a"), &stranger).unwrap_err().is_changed());
        remove_file(&dirs, &rel("a"), &first).unwrap();
        assert_eq!(fs::read(path.join("c")).unwrap(), b"same");
        // What is not the announced inode is not linked.
        fs::write(path.join("b"), "changed").unwrap();
        let error = link_existing(&dirs, &rel("b"), &first, &rel("d"), &Expect::Absent).unwrap_err();
        assert_eq!(error, ApplyError::Changed { path: rel("b") });
        no_leftovers(&share);
    });
}

#[test]
fn moves_keep_the_inode() {
    on_each_filesystem(|path| {
        let share = root(path);
        let dirs = share.batch();
        let file = put(&dirs, &rel("a"), b"moved", &Expect::Absent)
            .unwrap()
            .sig()
            .unwrap();
        let moved = move_entry(&dirs, &rel("a"), &file, &rel("b"), &Expect::Absent)
            .unwrap()
            .sig()
            .unwrap();
        assert_eq!(moved.ino, file.ino);
        let other = put(&dirs, &rel("c"), b"goes", &Expect::Absent)
            .unwrap()
            .sig()
            .unwrap();
        let moved = move_entry(&dirs, &rel("b"), &moved, &rel("c"), &Expect::Sig(other))
            .unwrap()
            .sig()
            .unwrap();
        assert_eq!(moved.ino, file.ino);
        assert!(!path.join("b").exists());
        // A directory with what is in it; the batch must not write to the old
        // place afterwards.
        assert_eq!(
            ensure_parents(&dirs, &rel("d/e/f")).unwrap(),
            [rel("d"), rel("d/e")]
        );
        assert_eq!(ensure_parents(&dirs, &rel("d/e/f")).unwrap(), []);
        _ = put(&dirs, &rel("d/e/f"), b"in", &Expect::Absent).unwrap();
        let dir = sig(&dirs, &rel("d"));
        _ = move_entry(&dirs, &rel("d"), &dir, &rel("g"), &Expect::Absent).unwrap();
        let error = put(&dirs, &rel("d/e/x"), b"", &Expect::Absent).unwrap_err();
        assert_eq!(error, ApplyError::ParentMissing { path: rel("d/e/x") });
        assert_eq!(fs::read(path.join("g/e/f")).unwrap(), b"in");
        // Onto a directory that is not empty: all stays.
        fs::create_dir(path.join("full")).unwrap();
        fs::write(path.join("full/x"), "").unwrap();
        let full = Expect::Sig(sig(&dirs, &rel("full")));
        let error = move_entry(&dirs, &rel("c"), &moved, &rel("full"), &full).unwrap_err();
        assert_eq!(error, ApplyError::NotEmpty { path: rel("full") });
        assert_eq!(fs::read(path.join("c")).unwrap(), b"moved");
        assert!(path.join("full/x").exists());
        let aside = set_aside(&dirs, &rel("full"), &rel("full (conflict)")).unwrap();
        assert_eq!(
            aside.ino,
            fs::metadata(path.join("full (conflict)")).unwrap().ino()
        );
        no_leftovers(&share);
    });
}

#[test]
fn the_root_says_what_is_wrong_with_it() {
    on_each_filesystem(|path| {
        let missing = ShareRoot::open(&path.join("none")).unwrap_err();
        assert!(missing.to_string().contains("does not exist"), "{missing}");
        fs::write(path.join("file"), "").unwrap();
        let file = ShareRoot::open(&path.join("file")).unwrap_err();
        assert!(file.to_string().contains("is not a directory"), "{file}");
        fs::create_dir(path.join("share")).unwrap();
        let share = root(&path.join("share"));
        share.still_there().unwrap();
        fs::rename(path.join("share"), path.join("away")).unwrap();
        assert!(
            share
                .still_there()
                .unwrap_err()
                .contains("does not exist any more")
        );
        fs::create_dir(path.join("share")).unwrap();
        assert!(share.still_there().unwrap_err().contains("another directory"));
    });
}

#[test]
fn refusals_are_in_plain_words() {
    let path = std::env::temp_dir();
    let folder = tempfile::tempdir_in(path).unwrap();
    let share = root(folder.path());
    let dirs = share.batch();
    let error = put(&dirs, &rel("no/such/f"), b"", &Expect::Absent).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the directory that should hold 'no/such/f' does not exist"
    );
    let system = |errno| ApplyError::system("create", &rel("f"), errno);
    let full = system(rustix::io::Errno::NOSPC);
    assert_eq!(
        full.to_string(),
        "cannot create 'f': the disk is full, or has no inodes left (see df and df -i)"
    );
    assert!(full.is_transient() && !system(rustix::io::Errno::NAMETOOLONG).is_transient());
}

fn xattr(name: &[u8]) -> Xattr {
    Xattr {
        name: name.into(),
        value: (*b"1").into(),
    }
}

/// What a step has left out, and what is at the path then for the index.
fn lacks(applied: Applied) -> (Here, Vec<String>) {
    let Applied::Short { here, .. } = applied else {
        panic!("nothing is missing: {applied:?}")
    };
    let reasons = here.lacks.iter().map(|why| why.to_string()).collect();
    (*here, reasons)
}

#[test]
fn what_cannot_be_had_is_said_and_all_else_is_applied() {
    on_each_filesystem(|path| {
        let share = root(path);
        let dirs = share.batch();
        // An attribute that this kernel knows no keeper for, and a flag that
        // neither ext4 nor tmpfs keeps.
        let mut entry = file_entry(b"");
        entry.xattrs = vec![xattr(b"nobody.knows"), xattr(b"user.known")];
        entry.flags = Flags::NOCOW | Flags::NODUMP;
        let staged = stage_file(&dirs, &rel("f"), &entry).unwrap();
        let applied = install(&dirs, staged.finish(&entry).unwrap(), &Expect::Absent).unwrap();
        let (here, reasons) = lacks(applied);
        assert_eq!(
            reasons,
            [
                "attributes like '*' are not mirrored",
                "this filesystem does not keep the flag 'C' (chattr)",
            ]
        );
        assert_eq!(
            (&here.xattrs[..], here.flags),
            (&[xattr(b"user.known")][..], Flags::NODUMP)
        );
        // What is seen then is no change.
        let (seen, _) = present(&dirs, &rel("f"));
        assert_eq!(Here::read(&entry, Some(&here), &seen), entry);
    });
}

#[test]
fn flags_are_set_and_locked_inodes_are_unlocked_for_a_step() {
    on_each_filesystem(|path| {
        let share = root(path);
        let dirs = share.batch();
        let mut entry = file_entry(b"content");
        entry.flags = Flags::NODUMP | Flags::NOATIME | Flags::IMMUTABLE;
        let mut staged = stage_file(&dirs, &rel("f"), &entry).unwrap();
        staged.append(b"content").unwrap();
        let applied = install(&dirs, staged.finish(&entry).unwrap(), &Expect::Absent).unwrap();
        let made = applied.sig().unwrap();
        assert_eq!(present(&dirs, &rel("f")).0.flags, Flags::NODUMP | Flags::NOATIME);
        if !is_root() {
            return;
        }
        let (locked, lacks) = lock(&dirs, &rel("f"), entry.flags, &made).unwrap();
        assert_eq!((present(&dirs, &rel("f")).0, lacks), (entry.clone(), vec![]));
        let refused = remove_file(&dirs, &rel("f"), &locked).unwrap_err();
        assert!(refused.to_string().contains("not permitted"), "{refused}");
        let unlocked = unlock(&dirs, &rel("f"), &locked).unwrap();
        remove_file(&dirs, &rel("f"), &unlocked).unwrap();
        no_leftovers(&share);
    });
}

#[test]
fn a_path_longer_than_a_system_call_takes_is_written_read_and_removed() {
    on_each_filesystem(|path| {
        let share = root(path);
        let dirs = share.batch();
        let mut at = RelPath::root();
        while at.as_bytes().len() < 9000 {
            at = at.join(&[b'd'; 250]).unwrap();
            let entry = Entry {
                kind: Kind::Directory,
                mode: 0o755,
                ..file_entry(b"")
            };
            _ = make_dir(&dirs, &at, &entry, &Expect::Absent).unwrap();
        }
        let file = at.join(&[b'f'; 255]).unwrap();
        _ = put(&dirs, &file, b"deep", &Expect::Absent).unwrap();
        assert_eq!(present(&dirs, &file).0, file_entry(b"deep"));
        let mut seen = 0;
        let skip = |_: &RelPath, _: bool| false;
        scan(
            &share,
            &RelPath::root(),
            &skip,
            || (),
            |dir, ()| seen += dir.children.len(),
        )
        .unwrap();
        assert_eq!(seen, file.depth());
        remove_file(&dirs, &file, &sig(&dirs, &file)).unwrap();
        // The test's folder is not to be left to who cannot remove it.
        for depth in (1..=at.depth()).rev() {
            assert_eq!(remove_dir(&dirs, &at.ancestor(depth)), Ok(DirRemoval::Removed));
        }
    });
}

/// Runs `test` on a fresh filesystem of this kind, made in a file; none if that
/// cannot be had here, which is said.
fn on_image(kind: &str, test: fn(&Path)) {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (image, at) = (folder.path().join("image"), folder.path().join("mounted"));
    fs::create_dir(&at).unwrap();
    fs::File::create(&image).unwrap().set_len(512 << 20).unwrap();
    let run = |command: &mut Command| command.output().is_ok_and(|out| out.status.success());
    let made = run(Command::new(format!("mkfs.{kind}")).arg(&image));
    if !made || !run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at)) {
        println!("skipped: no {kind} can be made and mounted here");
        return;
    }
    let result = std::panic::catch_unwind(|| test(&at));
    assert!(run(Command::new("umount").arg(&at)));
    result.unwrap();
}

#[test]
fn a_local_copy_shares_its_blocks_where_the_filesystem_can() {
    fn test(path: &Path) {
        let share = root(path);
        let dirs = share.batch();
        let content: Vec<u8> = (0..32u32 << 20)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let entry = file_entry(&content);
        let from = rel("from");
        _ = put(&dirs, &from, &content, &Expect::Absent).unwrap();
        sync_all(&share).unwrap();
        let free =
            || rustix::fs::statvfs(path).unwrap().f_bavail * rustix::fs::statvfs(path).unwrap().f_frsize;
        let before = free();
        for n in 0..5 {
            let to = rel(&format!("copy{n}"));
            let staged = clone_local(&dirs, &from, &sig(&dirs, &from), &to, &entry).unwrap();
            _ = install(&dirs, staged.finish(&entry).unwrap(), &Expect::Absent).unwrap();
        }
        sync_all(&share).unwrap();
        let cost = before.saturating_sub(free());
        assert!(cost < 16 << 20, "five copies of 32 MiB took {cost} bytes");
        assert_eq!(fs::read(path.join("copy4")).unwrap(), content);
        no_leftovers(&share);
    }
    on_image("btrfs", test);
    on_image("xfs", test);
}

#[test]
fn what_only_empty_files_take_is_given_before_the_content() {
    on_image("btrfs", |path| {
        let share = root(path);
        let dirs = share.batch();
        for flags in [Flags::NOCOW, Flags::COMPRESS] {
            let entry = Entry {
                flags,
                ..file_entry(b"content")
            };
            let to = rel(&flags.to_string());
            let mut staged = stage_file(&dirs, &to, &entry).unwrap();
            staged.append(b"content").unwrap();
            let applied = install(&dirs, staged.finish(&entry).unwrap(), &Expect::Absent).unwrap();
            assert!(matches!(applied, Applied::AsWritten(_)), "{applied:?}");
            assert_eq!(present(&dirs, &to).0, entry);
            // One that has it does not lose it once it is not empty, and says so.
            let plain = file_entry(b"content");
            let applied = set_attrs(&dirs, &to, &plain, &applied.sig().unwrap()).unwrap();
            match flags == Flags::NOCOW {
                true => {
                    let said = ["the flag 'C' (chattr) can be changed on empty files only"];
                    assert_eq!(lacks(applied).1, said);
                }
                false => assert_eq!(present(&dirs, &to).0, plain),
            }
        }
    });
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k,nr_inodes=16", "omirr-test"])
        .arg(folder.path())
        .status();
    if !mount.is_ok_and(|status| status.success()) {
        println!("skipped: no tmpfs can be mounted here");
        return;
    }
    let unmount = || {
        Command::new("umount")
            .arg("-l")
            .arg(folder.path())
            .status()
            .unwrap()
    };
    let result = std::panic::catch_unwind(|| {
        let share = root(folder.path());
        let dirs = share.batch();
        let mut staged = stage_file(&dirs, &rel("big"), &file_entry(b"")).unwrap();
        let error = staged.append(&[1; 100 << 10]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot write 'big': the disk is full, or has no inodes left (see df and df -i)"
        );
        assert!(error.is_transient());
        drop(staged);
        _ = put(&dirs, &rel("small"), &[1; 40 << 10], &Expect::Absent).unwrap();
        no_leftovers(&share);
    });
    unmount();
    result.unwrap();
}

#[test]
fn only_attributes_changed_means_no_reading() {
    on_each_filesystem(|path| {
        let share = root(path);
        let dirs = share.batch();
        let f = rel("f");
        _ = put(&dirs, &f, b"content", &Expect::Absent).unwrap();
        let (entry, mut known) = present(&dirs, &f);
        // Its change time is now; so reading it must have called it racy.
        assert!(known.racy);
        known.racy = false;
        let unchanged = observe(&dirs, &f, Some((&entry, &known)), Reading::IfChanged).unwrap();
        assert!(matches!(unchanged, Observed::Unchanged { .. }));
        let seen =
            |entry: &Entry, known: &StatSig, reading| match observe(&dirs, &f, Some((entry, known)), reading)
                .unwrap()
            {
                Observed::Present { entry, content, .. } => (entry, content),
                other => panic!("{other:?}"),
            };
        fs::set_permissions(path.join("f"), fs::Permissions::from_mode(0o600)).unwrap();
        let (changed, content) = seen(&entry, &known, Reading::IfChanged);
        assert_eq!(
            (changed.mode, changed.content(), content),
            (0o600, entry.content(), None)
        );
        let (_, content) = seen(&entry, &known, Reading::Always);
        assert_eq!(content.unwrap()[..], *b"content");
        let racy = StatSig {
            racy: true,
            ..sig(&dirs, &f)
        };
        assert_eq!(
            seen(&entry, &racy, Reading::IfChanged).1.unwrap()[..],
            *b"content"
        );
        fs::write(path.join("f"), "other").unwrap();
        let (changed, content) = seen(&entry, &known, Reading::IfChanged);
        assert_eq!(
            (changed.content(), &content.unwrap()[..]),
            (file_entry(b"other").content(), &b"other"[..])
        );
        // Larger than what is handed over, and larger than a buffer.
        let large = vec![7; 700_000];
        fs::write(path.join("f"), &large).unwrap();
        let (changed, content) = seen(&entry, &known, Reading::IfChanged);
        assert_eq!((changed.content(), content), (file_entry(&large).content(), None));
    });
}

#[test]
fn a_scan_tells_everything_once_and_parents_first() {
    on_each_filesystem(|path| {
        let mut expected = std::collections::BTreeSet::new();
        for a in 0..12 {
            for b in 0..12 {
                fs::create_dir_all(path.join(format!("d{a}/e{b}"))).unwrap();
                expected.insert(format!("d{a}/e{b}"));
                for c in 0..3 {
                    fs::write(path.join(format!("d{a}/e{b}/f{c}")), "").unwrap();
                    expected.insert(format!("d{a}/e{b}/f{c}"));
                }
            }
            expected.insert(format!("d{a}"));
        }
        symlink("d1", path.join("link")).unwrap();
        fs::create_dir(path.join("skipped")).unwrap();
        fs::write(path.join("skipped/x"), "").unwrap();
        expected.insert("link".to_owned());
        let share = root(path);
        let mut found = std::collections::BTreeSet::new();
        let mut entered = std::collections::BTreeSet::from([".".to_owned()]);
        let skip = |path: &RelPath, is_dir: bool| is_dir && path.name() == b"skipped";
        let summary = scan(
            &share,
            &RelPath::root(),
            &skip,
            || (),
            |dir, ()| {
                assert!(dir.path.is_root() || entered.contains(&dir.path.parent().unwrap().to_string()));
                entered.insert(dir.path.to_string());
                for child in dir.children {
                    let child_path = dir.path.join(&child.name).unwrap();
                    assert_eq!(sig(&share.batch(), &child_path), child.sig);
                    assert!(found.insert(child_path.to_string()));
                }
            },
        )
        .unwrap();
        assert_eq!(found, expected);
        assert_eq!(summary.entries, expected.len() as u64);
        assert_eq!(summary.dirs, 1 + 12 + 144);
        let mut beneath = 0;
        let part = scan(&share, &rel("d3"), &|_, _| false, || (), |_, ()| beneath += 1).unwrap();
        assert_eq!((part.entries, beneath), (12 + 36, 13));
        assert!(scan(&share, &rel("none"), &|_, _| false, || (), |_, ()| {}).is_err());
    });
}

#[test]
fn a_mount_beneath_the_share_is_not_entered() {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("share/m")).unwrap();
    fs::create_dir(folder.path().join("bound")).unwrap();
    fs::write(folder.path().join("bound/x"), "").unwrap();
    // A bind mount of the same filesystem: the device number tells nothing.
    let mounted = Command::new("mount")
        .arg("--bind")
        .arg(folder.path().join("bound"))
        .arg(folder.path().join("share/m"))
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("skipped: nothing can be mounted here");
        return;
    }
    let result = std::panic::catch_unwind(|| {
        let share = root(&folder.path().join("share"));
        let dirs = share.batch();
        assert_eq!(
            observe(&dirs, &rel("m"), None, Reading::Always).unwrap(),
            Observed::Foreign
        );
        assert_eq!(
            observe(&dirs, &rel("m/x"), None, Reading::Always).unwrap(),
            Observed::Foreign
        );
        let error = put(&dirs, &rel("m/y"), b"", &Expect::Absent).unwrap_err();
        assert_eq!(
            error.to_string(),
            "refused: 'm/y' leads through a mount point, 'm'"
        );
        let summary = scan(&share, &RelPath::root(), &|_, _| false, || (), |_, ()| {}).unwrap();
        assert_eq!(summary.entries, 0);
        assert_eq!(
            (&summary.unseen[0].path, summary.unseen[0].foreign),
            (&rel("m"), true)
        );
    });
    Command::new("umount")
        .arg("-l")
        .arg(folder.path().join("share/m"))
        .status()
        .unwrap();
    result.unwrap();
}
