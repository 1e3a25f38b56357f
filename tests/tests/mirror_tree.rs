//! The source tree of Linux, over 78,000 files, mirrored natively: unpacked
//! into one share, then changed on both sides at once, then with one node
//! killed and returned, then restarted with nothing to do.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use omirr_tests::nodes::{Pair, may_mirror};

const LONG: Duration = Duration::from_secs(300);

/// The tree's archive, from Debian's package `linux-source-6.1`.
fn archive() -> Option<PathBuf> {
    let archive = PathBuf::from("/usr/src/linux-source-6.1.tar.xz");
    if archive.exists() {
        return Some(archive);
    }
    omirr_tests::skip(
        "mirror_tree",
        &format!(
            "{} is missing; `cargo xtask setup` installs it",
            archive.display()
        ),
    );
    None
}

fn run(command: &mut Command) {
    let out = command.output().expect("the command can be started");
    assert!(
        out.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

/// Changes of every kind beneath `tree`, in folders of `side` alone, so that
/// both sides can do it at once; `round` makes each time's changes new.
fn change(tree: &Path, side: &str, round: usize) {
    let folders = match side {
        "one" => ["fs", "net"],
        _ => ["kernel", "sound"],
    };
    for folder in folders {
        let folder = tree.join(folder);
        let mut files: Vec<_> = walk(&folder).into_iter().filter(|path| path.is_file()).collect();
        files.sort();
        for (n, file) in files.iter().enumerate() {
            match (n + round) % 40 {
                0 => fs::write(file, format!("changed by {side} in round {round}\n")).unwrap(),
                1 => fs::remove_file(file).unwrap(),
                2 => fs::rename(file, file.with_extension(format!("moved{round}"))).unwrap(),
                3 => fs::set_permissions(file, fs::Permissions::from_mode(0o640)).unwrap(),
                4 => {
                    let mut text = fs::read(file).unwrap();
                    text.extend_from_slice(b"/* one more line */\n");
                    fs::write(file, text).unwrap();
                }
                5 => {
                    let link = file.with_extension(format!("link{round}"));
                    fs::hard_link(file, link).unwrap();
                }
                6 => {
                    let link = file.with_extension(format!("sym{round}"));
                    symlink(file.file_name().unwrap(), link).unwrap();
                }
                _ => {}
            }
        }
        // A whole directory gets another name, and one goes.
        let mut inner: Vec<_> = fs::read_dir(&folder)
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| p.is_dir())
            .collect();
        inner.sort();
        if inner.len() >= 4 {
            fs::rename(&inner[0], folder.join(format!("renamed-by-{side}-{round}"))).unwrap();
            fs::remove_dir_all(&inner[1]).unwrap();
        }
    }
    let new = tree.join(format!("made-by-{side}-{round}"));
    fs::create_dir_all(new.join("deep/er")).unwrap();
    for n in 0..50 {
        fs::write(new.join(format!("deep/er/{n}")), vec![b'x'; n * 1000]).unwrap();
    }
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![folder.to_owned()];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            } else if entry.file_type().unwrap().is_file() {
                found.push(entry.path());
            }
        }
    }
    found
}

#[test]
fn a_real_tree_is_mirrored_through_changes_kill_and_restart() {
    let Some(archive) = archive() else { return };
    if !may_mirror(module_path!()) {
        return;
    }
    let mut pair = Pair::new();
    for node in [&mut pair.one, &mut pair.two] {
        node.tracer = "source = \"fanotify\"".to_owned();
    }
    pair.start();

    println!("unpacking {} into one share", archive.display());
    run(Command::new("tar")
        .arg("-xJf")
        .arg(&archive)
        .arg("-C")
        .arg(&pair.one.share));
    let tree = fs::read_dir(&pair.one.share)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let tree = PathBuf::from(tree.file_name().unwrap());
    // What the archive has none of: extended attributes and times of their own.
    let marked = pair.one.share.join(&tree).join("Makefile");
    run(Command::new("setfattr")
        .args(["-n", "user.omirr.test", "-v", "value"])
        .arg(&marked));
    run(Command::new("touch")
        .args(["-d", "2001-02-03 04:05:06.123456789"])
        .arg(&marked));
    run(Command::new("setfacl").args(["-m", "u:12345:rw"]).arg(&marked));
    run(Command::new("chown").args(["1234:4321"]).arg(&marked));
    pair.settle_equal(LONG);
    let count = walk(&pair.two.share).len();
    assert!(count > 78_000, "only {count} files have arrived");

    println!("changing both sides at once");
    std::thread::scope(|scope| {
        scope.spawn(|| change(&pair.one.share.join(&tree), "one", 1));
        scope.spawn(|| change(&pair.two.share.join(&tree), "two", 1));
    });
    pair.settle_equal(LONG);

    println!("killing one node while the other goes on");
    change(&pair.one.share.join(&tree), "one", 2);
    pair.one.kill();
    change(&pair.two.share.join(&tree), "two", 2);
    change(&pair.one.share.join(&tree), "one", 3);
    pair.one.start();
    pair.settle_equal(LONG);

    println!("restarting both with nothing to do");
    pair.one.stop();
    pair.two.stop();
    pair.start();
    pair.settle_equal(LONG);
    for node in [&pair.one, &pair.two] {
        let stats = node.stats();
        for figure in [
            "content_sent_bytes",
            "content_received_bytes",
            "rows_applied",
            "rows_made",
        ] {
            assert_eq!(
                stats["shares"][0][figure], 0,
                "{}: {figure} in {stats:#}",
                node.name
            );
        }
    }
}
