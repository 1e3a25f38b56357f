//! Real software on top of two nodes in a guest, with changes coming from eBPF:
//! a git repository, an SQLite database that is open in WAL mode, and an ext4
//! image while a loop device has it mounted, of whose writes fanotify does not
//! tell. Smaller than `mirror_software`, since the processor is emulated.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use omirr_tests::guest::{self, Guest};
use omirr_tests::net::Cable;
use omirr_tests::nodes::Pair;
use omirr_tests::run;

const LONG: Duration = Duration::from_secs(400);
/// Where an empty ext4 file system of 16 MiB waits, whole, in the guest.
const IMAGE: &str = "/image";

/// A guest with git, sqlite3 and the image; none, with the reason printed, where
/// they cannot be had.
fn fit(image: &Path) -> Result<impl FnOnce(Guest) -> Guest, String> {
    let file = fs::File::create(image).map_err(|error| error.to_string())?;
    file.set_len(16 << 20).map_err(|error| error.to_string())?;
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
        .arg(image)
        .status();
    if !made.is_ok_and(|made| made.success()) {
        return Err("mkfs.ext4 does not work here".to_owned());
    }
    let mut programs = Vec::new();
    for program in ["git", "sqlite3"] {
        let found = ["/usr/local/bin", "/usr/bin", "/bin"]
            .map(|folder| Path::new(folder).join(program))
            .into_iter()
            .find(|path| path.exists());
        programs.push(found.ok_or_else(|| format!("there is no {program} here"))?);
    }
    let image = image.to_owned();
    Ok(move |guest: Guest| {
        guest
            .memory_mib(1536)
            .timeout(Duration::from_secs(600))
            .env("OMIRR_TEST_DIR", "/mnt")
            .env("HOME", "/tmp")
            .program_at(&programs[0], "/usr/bin/git")
            .program_at(&programs[1], "/usr/bin/sqlite3")
            .file(&image, IMAGE)
            .module("loop")
    })
}

fn git(at: &Path, args: &[&str]) {
    run(Command::new("git")
        .args(["-c", "user.name=t", "-c", "user.email=t@example.org"])
        .args([
            "-c",
            "init.defaultBranch=main",
            "-c",
            "gc.auto=0",
            "-c",
            "maintenance.auto=false",
        ])
        .args(args)
        .current_dir(at));
}

fn repository(pair: &mut Pair) {
    println!("a git repository");
    let work = pair.one.share.join("work");
    git(&pair.one.share, &["init", "-q", "--template=", "work"]);
    for commit in 0..3 {
        for n in 0..20 {
            fs::write(
                work.join(format!("f{n}")),
                format!("{n} in {}\n", commit * (n % 3)),
            )
            .unwrap();
        }
        git(&work, &["add", "-A"]);
        git(&work, &["commit", "-qm", "another"]);
    }
    pair.settle_equal(LONG);
    git(&work, &["checkout", "-q", "--detach", "HEAD~2"]);
    git(&work, &["checkout", "-q", "main"]);
    git(&work, &["repack", "-qad"]);
    pair.settle_equal(LONG);
    git(&pair.two.share.join("work"), &["fsck", "--full"]);
}

fn database(pair: &mut Pair) {
    println!("a database in WAL mode");
    let database = pair.one.share.join("data.db");
    let done = Path::new("/tmp/done");
    let mut writer = Command::new("sqlite3")
        .arg("-batch")
        .arg(&database)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("sqlite3 can be started");
    let mut stdin = writer.stdin.take().expect("it is a pipe");
    writeln!(
        stdin,
        "PRAGMA journal_mode = WAL; PRAGMA wal_autocheckpoint = 50; CREATE TABLE t (text TEXT);"
    )
    .unwrap();
    for round in 1..=3 {
        for _ in 0..20 {
            writeln!(stdin, "INSERT INTO t SELECT hex(randomblob(1000));").unwrap();
        }
        writeln!(
            stdin,
            ".output {}\nSELECT count(*) FROM t;\n.output",
            done.display()
        )
        .unwrap();
        let expected = round * 20;
        let deadline = std::time::Instant::now() + LONG;
        while fs::read_to_string(done).unwrap_or_default().trim() != expected.to_string() {
            assert!(std::time::Instant::now() < deadline, "sqlite3 does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
        pair.settle(LONG);
        let copy = Path::new("/tmp/copy");
        fs::create_dir_all(copy).unwrap();
        for name in ["data.db", "data.db-wal"] {
            fs::copy(pair.two.share.join(name), copy.join(name)).unwrap();
        }
        let found = run(Command::new("sqlite3")
            .arg(copy.join("data.db"))
            .arg("PRAGMA integrity_check; SELECT count(*) FROM t;"));
        assert_eq!(found, format!("ok\n{expected}\n"));
        fs::remove_dir_all(copy).unwrap();
    }
    drop(stdin);
    assert!(writer.wait().unwrap().success());
    pair.settle_equal(LONG);
}

fn image(pair: &mut Pair) {
    println!("a mounted image");
    let image = pair.one.share.join("disk.img");
    fs::copy(IMAGE, &image).unwrap();
    let mounted = Path::new("/tmp/mounted");
    fs::create_dir_all(mounted).unwrap();
    run(Command::new("mount")
        .args(["-t", "ext4", "-o", "loop"])
        .args([&image, mounted]));
    for round in 0..2 {
        for n in 0..20 {
            fs::write(
                mounted.join(format!("f{n}")),
                format!("{n} in {round}\n").repeat(100 * n),
            )
            .unwrap();
        }
        run(&mut Command::new("sync"));
        // Mounted all the while: nobody has closed the image.
        pair.settle_equal(LONG);
    }
    run(Command::new("umount").arg(mounted));
    pair.settle_equal(LONG);
}

fn software(source: &str) {
    let cable = Arc::new(Cable::lay());
    let mut pair = Pair::new();
    pair.on_cable(&cable);
    for node in [&mut pair.one, &mut pair.two] {
        node.tracer = format!("source = {source:?}");
    }
    pair.start();
    pair.settle(LONG);
    repository(&mut pair);
    database(&mut pair);
    image(&mut pair);
    for node in [&pair.one, &pair.two] {
        assert_eq!(
            node.status().unwrap()["shares"][0]["conflicts"],
            0,
            "{}",
            node.status_text()
        );
    }
    pair.one.stop();
    pair.two.stop();
}

#[test]
fn what_software_leaves_is_mirrored_by_ebpf_on_6_1() {
    let folder = tempfile::tempdir().unwrap();
    // Inside the guest the rest of this is not used.
    match fit(&folder.path().join("image")) {
        Ok(fit) => guest::inside("6.1", fit, || software("ebpf")),
        Err(_) if Path::new(IMAGE).exists() => software("ebpf"),
        Err(reason) => omirr_tests::skip("what_software_leaves_is_mirrored_by_ebpf_on_6_1", &reason),
    }
}
