//! Real software on top of two real nodes: what it leaves on one side is on the
//! other, file by file and attribute by attribute, by two judges that know
//! nothing of omirr: an independent walk, and rsync from each side against the
//! other, which must find nothing to do.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use omirr_tests::nodes::{Pair, may_mirror};
use omirr_tests::run;

const SOON: Duration = Duration::from_secs(180);

/// Whether everything that a test needs is installed; says what is not.
fn has(test: &str, programs: &[&str]) -> bool {
    let there = |program: &&&str| {
        let found = Command::new(program)
            .arg("--version")
            .stdin(Stdio::null())
            .output();
        found.is_ok()
    };
    let missing: Vec<_> = programs.iter().filter(|program| !there(program)).collect();
    if !missing.is_empty() {
        omirr_tests::skip(test, &format!("{missing:?} cannot be found"));
    }
    missing.is_empty()
}

fn pair(test: &str, programs: &[&str]) -> Option<Pair> {
    if !may_mirror(test) || !has(test, &["rsync"]) || !has(test, programs) {
        return None;
    }
    Pair::running(test, |_| ())
}

/// Waits until both have everything; then the independent walk and rsync in
/// both directions must find no difference.
fn identical(pair: &mut Pair, after: &str) {
    println!("{after}");
    pair.settle_equal(SOON);
    for (from, to) in [(&pair.one, &pair.two), (&pair.two, &pair.one)] {
        let found = run(Command::new("rsync")
            .args(["-aHAXSn", "--delete", "--itemize-changes"])
            .arg(format!("{}/", from.share.display()))
            .arg(format!("{}/", to.share.display())));
        assert!(
            found.is_empty(),
            "{after}, from {} to {}:\n{found}",
            from.name,
            to.name
        );
    }
}

fn no_conflicts(pair: &Pair) {
    for node in [&pair.one, &pair.two] {
        let status = node.status().unwrap();
        assert_eq!(status["shares"][0]["conflicts"], 0, "{}", node.status_text());
    }
}

fn git(at: &Path, args: &[&str]) -> String {
    let identity = [
        "-c",
        "user.name=omirr",
        "-c",
        "user.email=omirr@example.org",
        "-c",
        "init.defaultBranch=main",
        "-c",
        "safe.directory=*",
        "-c",
        "advice.detachedHead=false",
    ];
    run(Command::new("git")
        .args(identity)
        .args(args)
        .current_dir(at)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_SYSTEM", "/dev/null")
        // Nothing in the background after the command's end.
        .env("GIT_CONFIG_COUNT", "2")
        .env("GIT_CONFIG_KEY_0", "gc.auto")
        .env("GIT_CONFIG_VALUE_0", "0")
        .env("GIT_CONFIG_KEY_1", "maintenance.auto")
        .env("GIT_CONFIG_VALUE_1", "false")
        // Looking must not write.
        .env("GIT_OPTIONAL_LOCKS", "0"))
}

#[test]
fn a_git_repository_that_is_worked_on_is_the_same_repository_on_the_other_side() {
    let test = "a_git_repository_that_is_worked_on_is_the_same_repository_on_the_other_side";
    let Some(mut pair) = pair(test, &["git"]) else {
        return;
    };
    let share = pair.one.share.clone();
    let origin = share.join("origin.git");
    git(&share, &["init", "-q", "--bare", "origin.git"]);
    git(&share, &["clone", "-q", "origin.git", "work"]);
    let work = share.join("work");
    for commit in 0..4 {
        for n in 0..80 {
            let folder = work.join(format!("src/{}", n % 7));
            fs::create_dir_all(&folder).unwrap();
            if (n + commit) % 3 == 0 {
                fs::write(
                    folder.join(format!("f{n}")),
                    format!("{n} in {commit}\n").repeat(n + 1),
                )
                .unwrap();
            }
        }
        if commit == 2 {
            git(&work, &["mv", "src/0", "moved"]);
        }
        git(&work, &["add", "-A"]);
        git(&work, &["commit", "-qm", &format!("commit {commit}")]);
    }
    git(&work, &["push", "-q", "origin", "HEAD:main"]);
    identical(&mut pair, "cloned, committed to and pushed");
    for _ in 0..3 {
        for place in ["HEAD~3", "HEAD@{1}", "HEAD~1", "HEAD@{1}"] {
            git(&work, &["checkout", "-q", place]);
        }
    }
    identical(&mut pair, "checked out back and forth");
    git(&work, &["checkout", "-q", "-B", "side", "HEAD~2"]);
    fs::write(work.join("on-the-side"), "side\n").unwrap();
    git(&work, &["add", "-A"]);
    git(&work, &["commit", "-qm", "on the side"]);
    git(&work, &["rebase", "-q", "origin/main"]);
    git(&work, &["push", "-q", "origin", "side"]);
    git(&work, &["repack", "-qad"]);
    git(&origin, &["gc", "-q", "--prune=now"]);
    identical(&mut pair, "rebased, repacked and collected");
    // The other side works with what it got, and pushes.
    let theirs = pair.two.share.join("work");
    git(&theirs, &["fsck", "--full", "--strict"]);
    assert_eq!(git(&theirs, &["status", "--porcelain"]), "");
    git(&pair.two.share, &["clone", "-q", "origin.git", "second"]);
    let second = pair.two.share.join("second");
    fs::write(second.join("from-two"), "two\n").unwrap();
    git(&second, &["add", "-A"]);
    git(&second, &["commit", "-qm", "from two"]);
    git(&second, &["push", "-q", "origin", "HEAD:main"]);
    identical(&mut pair, "cloned and pushed to on the other side");
    git(&origin, &["fsck", "--full", "--strict"]);
    let seen = git(&origin, &["log", "-1", "--format=%s", "main"]);
    assert_eq!(seen.trim(), "from two");
    no_conflicts(&pair);
}

#[test]
fn a_maildir_with_deliveries_on_both_sides_loses_and_doubles_no_message() {
    const EACH: usize = 150;
    let test = "a_maildir_with_deliveries_on_both_sides_loses_and_doubles_no_message";
    let Some(mut pair) = pair(test, &[]) else { return };
    for folder in ["tmp", "new", "cur"] {
        fs::create_dir_all(pair.one.share.join("Maildir").join(folder)).unwrap();
    }
    identical(&mut pair, "an empty Maildir");
    let deliver = |share: &Path, host: &str| {
        let mail = share.join("Maildir");
        for n in 0..EACH {
            let name = format!("17000{n:05}.M{n}P1.{host}");
            let mut message = fs::File::create(mail.join("tmp").join(&name)).unwrap();
            write!(message, "Subject: {n} from {host}\n\n{}", "text\n".repeat(n * 7)).unwrap();
            message.sync_all().unwrap();
            // Some deliver by a link and a removal, as the specification says,
            // and some by a rename, as everyone does.
            let (from, to) = (mail.join("tmp").join(&name), mail.join("new").join(&name));
            if n % 3 == 0 {
                fs::hard_link(&from, &to).unwrap();
                fs::remove_file(&from).unwrap();
            } else {
                fs::rename(&from, &to).unwrap();
            }
        }
    };
    // A reader on one side only: two of them would be a conflict by design.
    let read = |share: &Path, done: &dyn Fn() -> bool| {
        let mail = share.join("Maildir");
        loop {
            let last = done();
            for entry in fs::read_dir(mail.join("new")).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let seen = mail.join("cur").join(format!("{name}:2,S"));
                // It may be between two names of omirr's at this moment.
                let _ = fs::rename(mail.join("new").join(&name), seen);
            }
            if last {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    std::thread::scope(|scope| {
        let (one, two) = (&pair.one.share, &pair.two.share);
        let deliveries = [
            scope.spawn(|| deliver(one, "one")),
            scope.spawn(|| deliver(two, "two")),
        ];
        scope.spawn(move || {
            read(two, &|| {
                deliveries.iter().all(std::thread::ScopedJoinHandle::is_finished)
            })
        });
    });
    identical(&mut pair, "messages delivered on both sides and read on one");
    let mut messages: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for folder in ["tmp", "new", "cur"] {
        for entry in fs::read_dir(pair.one.share.join("Maildir").join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let text = fs::read_to_string(&path).unwrap();
            let subject = text.lines().next().unwrap_or_default().to_owned();
            messages.entry(subject).or_default().push(path);
        }
    }
    let doubled: Vec<_> = messages.values().filter(|paths| paths.len() != 1).collect();
    assert!(doubled.is_empty(), "{doubled:?}");
    assert_eq!(messages.len(), 2 * EACH);
    assert_eq!(
        fs::read_dir(pair.one.share.join("Maildir/tmp")).unwrap().count(),
        0
    );
    no_conflicts(&pair);
}

#[test]
fn what_npm_installs_and_removes_is_the_same_on_the_other_side() {
    let test = "what_npm_installs_and_removes_is_the_same_on_the_other_side";
    let Some(mut pair) = pair(test, &["npm", "node"]) else {
        return;
    };
    let library = pair.base().join("library");
    fs::create_dir_all(library.join("lib")).unwrap();
    fs::write(
        library.join("package.json"),
        r#"{"name": "library", "version": "1.0.0", "main": "lib/0.js", "bin": {"library": "lib/1.js"}}"#,
    )
    .unwrap();
    for n in 0..250 {
        fs::write(
            library.join(format!("lib/{n}.js")),
            format!("#!/usr/bin/env node\nmodule.exports = {n};\n").repeat(1 + n % 5),
        )
        .unwrap();
    }
    let cache = pair.base().join("cache");
    let npm = |at: &Path, args: &[&str]| {
        run(Command::new("npm")
            .args(args)
            .args(["--offline", "--no-audit", "--no-fund", "--loglevel=error"])
            .env("npm_config_cache", &cache)
            .env("npm_config_update_notifier", "false")
            .current_dir(at))
    };
    npm(&library, &["pack"]);
    let app = pair.one.share.join("app");
    fs::create_dir(&app).unwrap();
    fs::write(app.join("package.json"), r#"{"name": "app", "version": "1.0.0"}"#).unwrap();
    let tarball = library.join("library-1.0.0.tgz");
    npm(&app, &["install", tarball.to_str().unwrap()]);
    identical(&mut pair, "npm install");
    let theirs = pair.two.share.join("app");
    assert!(theirs.join("node_modules/.bin/library").is_symlink());
    let loaded = run(Command::new("node")
        .args(["-e", "console.log(require('library'))"])
        .current_dir(&theirs));
    assert_eq!(loaded.trim(), "0");
    npm(&app, &["uninstall", "library"]);
    identical(&mut pair, "npm uninstall");
    assert!(!theirs.join("node_modules/library").exists());
    no_conflicts(&pair);
}

#[test]
fn what_cargo_builds_runs_on_the_other_side() {
    let test = "what_cargo_builds_runs_on_the_other_side";
    let Some(mut pair) = pair(test, &["cargo"]) else {
        return;
    };
    let workspace = pair.one.share.join("workspace");
    let put = |name: &str, text: &str| {
        let file = workspace.join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    };
    put(
        "Cargo.toml",
        "[workspace]\nmembers = [\"app\", \"left\", \"right\"]\nresolver = \"2\"\n",
    );
    for member in ["left", "right"] {
        put(
            &format!("{member}/Cargo.toml"),
            &format!("[package]\nname = \"{member}\"\nversion = \"0.1.0\"\nedition = \"2021\"\n"),
        );
        put(
            &format!("{member}/src/lib.rs"),
            &format!("pub fn side() -> &'static str {{ \"{member}\" }}\n"),
        );
    }
    put(
        "app/Cargo.toml",
        "[package]\nname = \"app\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[dependencies]\nleft = { path = \"../left\" }\nright = { path = \"../right\" }\n",
    );
    put(
        "app/src/main.rs",
        "fn main() { println!(\"{} {}\", left::side(), right::side()); }\n",
    );
    let cargo = || {
        run(Command::new("cargo")
            .args(["build", "--offline", "-q"])
            .env_remove("CARGO_TARGET_DIR")
            .env_remove("RUSTFLAGS")
            .current_dir(&workspace))
    };
    let runs = |pair: &Pair| {
        run(&mut Command::new(
            pair.two.share.join("workspace/target/debug/app"),
        ))
    };
    cargo();
    identical(&mut pair, "cargo build");
    assert_eq!(runs(&pair), "left right\n");
    put(
        "left/src/lib.rs",
        "pub fn side() -> &'static str { \"changed\" }\n",
    );
    cargo();
    identical(&mut pair, "cargo build after a change");
    assert_eq!(runs(&pair), "changed right\n");
    no_conflicts(&pair);
}

/// sqlite3 with a database open, until it is dropped.
struct Sqlite {
    child: Child,
    stdin: Option<ChildStdin>,
    /// Where it writes that it is done with what it was told.
    done: PathBuf,
    told: usize,
}

impl Sqlite {
    fn open(database: &Path, done: PathBuf) -> Sqlite {
        let mut child = Command::new("sqlite3")
            .arg("-batch")
            .arg(database)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        Sqlite {
            child,
            stdin,
            done,
            told: 0,
        }
    }

    /// Has it run these statements; returns when they are done.
    fn tell(&mut self, statements: &str) {
        self.told += 1;
        let stdin = self.stdin.as_mut().unwrap();
        let shown = self.done.display();
        write!(
            stdin,
            "{statements}\n.output {shown}\nSELECT {};\n.output\n",
            self.told
        )
        .unwrap();
        stdin.flush().unwrap();
        let deadline = Instant::now() + SOON;
        while fs::read_to_string(&self.done).unwrap_or_default().trim() != self.told.to_string() {
            assert!(Instant::now() < deadline, "sqlite3 does not answer");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn close(mut self) {
        drop(self.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Sqlite {
    fn drop(&mut self) {
        // It has ended already, unless the test fails.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_sqlite_database_in_wal_mode_opens_on_the_other_side_whenever_the_writer_pauses() {
    let test = "an_sqlite_database_in_wal_mode_opens_on_the_other_side";
    let Some(mut pair) = pair(test, &["sqlite3"]) else {
        return;
    };
    let database = pair.one.share.join("data.db");
    let mut writer = Sqlite::open(&database, pair.base().join("done"));
    writer.tell("PRAGMA journal_mode = WAL; PRAGMA wal_autocheckpoint = 200; CREATE TABLE t (id INTEGER PRIMARY KEY, text TEXT);");
    let mut expected = 0;
    for round in 0..6 {
        for _ in 0..40 {
            expected += 20;
            writer.tell(
                "BEGIN; WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20) INSERT INTO t (text) SELECT hex(randomblob(200)) FROM n; COMMIT;",
            );
        }
        // It pauses, with the database open and part of the rows in the log.
        pair.settle(SOON);
        let copy = pair.base().join(format!("copy-{round}"));
        fs::create_dir(&copy).unwrap();
        for name in ["data.db", "data.db-wal"] {
            let (here, there) = (pair.one.share.join(name), pair.two.share.join(name));
            assert!(
                fs::read(&here).unwrap() == fs::read(&there).unwrap(),
                "{name} differs in round {round}"
            );
            fs::copy(there, copy.join(name)).unwrap();
        }
        let found = run(Command::new("sqlite3")
            .arg(copy.join("data.db"))
            .arg("PRAGMA integrity_check; SELECT count(*) FROM t;"));
        assert_eq!(found, format!("ok\n{expected}\n"), "round {round}");
    }
    writer.close();
    identical(&mut pair, "the database is closed");
    assert!(!pair.two.share.join("data.db-wal").exists());
    no_conflicts(&pair);
}

/// A mount that goes with the value.
struct Mounted(PathBuf);

impl Mounted {
    fn end(self) {
        run(Command::new("umount").arg(&self.0));
        std::mem::forget(self);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The test fails anyhow.
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn an_image_that_was_mounted_by_a_loop_device_is_the_same_on_the_other_side() {
    let test = "an_image_that_was_mounted_by_a_loop_device_is_the_same_on_the_other_side";
    let Some(mut pair) = pair(test, &[]) else { return };
    let image = pair.one.share.join("disk.img");
    let mount_point = pair.base().join("mounted");
    fs::create_dir(&mount_point).unwrap();
    fs::File::create(&image).unwrap().set_len(48 << 20).unwrap();
    let mount = |image: &Path, options: &str| {
        let done = Command::new("mount")
            .args(["-o", options])
            .args([image, &mount_point])
            .output();
        done.is_ok_and(|done| done.status.success())
            .then(|| Mounted(mount_point.clone()))
    };
    let made = Command::new("mkfs.ext4")
        // Nothing is to be written by a thread that takes its time.
        .args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
        .arg(&image)
        .status();
    let Some(mounted) = made
        .ok()
        .filter(|made| made.success())
        .and_then(|_| mount(&image, "loop"))
    else {
        omirr_tests::skip(test, "a loop device cannot be mounted here");
        return;
    };
    for round in 0..3u8 {
        for n in 0..60u32 {
            let name = mount_point.join(format!("f{}", n + u32::from(round) * 30));
            fs::write(name, vec![round + 1; (n * 512) as usize]).unwrap();
        }
        fs::remove_file(mount_point.join(format!("f{}", round * 30))).unwrap();
        run(Command::new("sync").arg("-f").arg(&mount_point));
        // The writes are those of the kernel's thread for the device. Of them
        // fanotify tells from Linux 6.12 on only when the device lets go of the
        // file (docs/KERNEL-SUPPORT.md), so half a change may be there now; what
        // comes must neither fail nor be taken for two versions.
        pair.settle(SOON);
    }
    let names: Vec<_> = fs::read_dir(&mount_point)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    mounted.end();
    identical(&mut pair, "unmounted");
    let theirs = pair.two.share.join("disk.img");
    run(Command::new("e2fsck").arg("-fn").arg(&theirs));
    let mounted = mount(&theirs, "loop,ro").unwrap();
    let there: Vec<_> = fs::read_dir(&mount_point)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(there, names);
    mounted.end();
    no_conflicts(&pair);
}
