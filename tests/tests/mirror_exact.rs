//! What a copy keeps, natively between two real nodes: everything that a file
//! can have, in one tree, compared by an independent walk and by rsync.
//!
//! `OMIRR_EXACT_ENTRIES=1000000` puts as many names into one directory as people
//! are afraid of.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use omirr_tests::nodes::{Node, Pair, may_mirror};

const LONG: Duration = Duration::from_secs(240);
const NOBODY: u32 = 65534;

/// Runs a program that must succeed; returns what it printed.
fn run(command: &str, arguments: &[&str], at: &Path) -> String {
    let out = Command::new(command).args(arguments).arg(at).output();
    let out = out.unwrap_or_else(|error| panic!("{command}: {error}"));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        out.status.success(),
        "{command} {arguments:?} {}: {said}",
        at.display()
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn chattr(flags: &str, at: &Path) {
    run("chattr", &[flags], at);
}

/// The same for what not every filesystem keeps.
fn chattr_if_kept(flags: &str, at: &Path) {
    let out = Command::new("chattr")
        .arg(flags)
        .arg(at)
        .output()
        .expect("chattr is there");
    if !out.status.success() {
        println!("this filesystem does not keep {flags}");
    }
}

fn setfattr(name: &str, value: &str, at: &Path) {
    run("setfattr", &["-h", "-n", name, "-v", value], at);
}

fn touch(time: &str, at: &Path) {
    run("touch", &["-h", "-m", "-d", time], at);
}

/// A pair whose tree may hold what only `chattr` can free.
struct Freed(Pair);

impl Drop for Freed {
    fn drop(&mut self) {
        let _ = Command::new("chattr")
            .args(["-R", "-f", "-i", "-a"])
            .arg(self.0.base())
            .output();
    }
}

fn pair(test: &str) -> Option<Freed> {
    if !may_mirror(test) {
        return None;
    }
    Some(Freed(Pair::new()))
}

/// What rsync would do to make `to` like `from`.
fn rsync(from: &Path, to: &Path) -> String {
    let slashed = |path: &Path| format!("{}/", path.display());
    let out = Command::new("rsync")
        .args(["-aHAXSn", "--delete", "--itemize-changes", "--exclude=/deep"])
        .args([slashed(from), slashed(to)])
        .output()
        .expect("rsync is there");
    let said = [out.stdout, out.stderr].concat();
    String::from_utf8_lossy(&said).into_owned()
}

fn settle_exact(pair: &mut Pair) {
    pair.settle_equal(LONG);
    let (one, two) = (&pair.one.share, &pair.two.share);
    assert_eq!(rsync(one, two), "", "{}", pair.two.log_tail());
    assert_eq!(rsync(two, one), "", "{}", pair.one.log_tail());
}

/// Something of everything.
fn make(root: &Path) {
    let at = |name: &str| root.join(name);
    for dir in ["empty", "links/a", "links/b", "acl", "sticky", "times"] {
        fs::create_dir_all(at(dir)).unwrap();
    }
    // Holes.
    let sparse = fs::File::create(at("sparse")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    for (place, text) in [(0, "begin"), (1 << 39, "middle"), ((1 << 40) - 3, "end")] {
        sparse.write_all_at(text.as_bytes(), place).unwrap();
    }
    // Hard links, across directories, and of a symlink.
    fs::write(at("links/a/first"), "linked").unwrap();
    fs::hard_link(at("links/a/first"), at("links/b/second")).unwrap();
    symlink("nowhere", at("links/symlink")).unwrap();
    fs::hard_link(at("links/symlink"), at("links/b/symlink")).unwrap();
    // Symlinks with an owner, a time and an attribute of their own.
    symlink("/etc/passwd", at("symlink")).unwrap();
    lchown(at("symlink"), Some(1234), Some(4321)).unwrap();
    setfattr("trusted.of", "the symlink", &at("symlink"));
    touch("1999-12-31 23:59:59.123456789", &at("symlink"));
    // Fifos, sockets, devices.
    run("mkfifo", &["-m", "0602"], &at("fifo"));
    drop(std::os::unix::net::UnixListener::bind(at("socket")).unwrap());
    let device = |name: &str, kind: &str, major: &str| {
        let done = Command::new("mknod")
            .arg(at(name))
            .args([kind, major, "3"])
            .status();
        assert!(done.unwrap().success());
    };
    device("char-device", "c", "1");
    device("block-device", "b", "259");
    // Modes.
    for (name, mode) in [("setuid", 0o4755), ("setgid", 0o2711), ("none", 0o0)] {
        fs::write(at(name), name).unwrap();
        chown(at(name), Some(2345), Some(5432)).unwrap();
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::set_permissions(at("sticky"), fs::Permissions::from_mode(0o3777)).unwrap();
    // Attributes in all namespaces, and capabilities.
    fs::write(at("attributes"), "with attributes").unwrap();
    for (name, value) in [
        ("user.empty", ""),
        ("user.name with spaces", "value"),
        ("trusted.omirr", "for root"),
        ("security.selinux", "system_u:object_r:httpd_sys_content_t:s0"),
        ("security.of.something.else", "kept"),
    ] {
        setfattr(name, value, &at("attributes"));
    }
    run("setcap", &["cap_net_raw,cap_net_admin=ep"], &at("attributes"));
    // Access control lists.
    run("setfacl", &["-m", "u:12345:rwx,g:54321:-w-,m::rwx"], &at("acl"));
    run("setfacl", &["-d", "-m", "u:12346:r-x,o::---"], &at("acl"));
    fs::write(at("acl/inherits"), "inherits").unwrap();
    // Names.
    let mut bytes: Vec<u8> = (1..=255).filter(|&byte| byte != b'/').collect();
    bytes.push(0xff);
    for name in [&bytes[..], &[b'\n'; 255], &[0xfe; 255], b" ", b"-rf", b"*"] {
        fs::write(root.join(std::ffi::OsStr::from_bytes(name)), "named").unwrap();
    }
    // Flags.
    for (name, flags) in [
        ("nodump", "+d"),
        ("noatime", "+A"),
        ("sync", "+S"),
        ("compress", "+c"),
    ] {
        fs::write(at(name), name).unwrap();
        chattr_if_kept(flags, &at(name));
    }
    fs::create_dir(at("dirsync")).unwrap();
    chattr_if_kept("+D", &at("dirsync"));
    // Filesystems that keep it take it for empty files only.
    fs::write(at("nocow"), "").unwrap();
    chattr_if_kept("+C", &at("nocow"));
    fs::write(at("nocow"), "no longer empty").unwrap();
    // What is made in there gets the flag from it.
    fs::create_dir(at("inherits")).unwrap();
    chattr("+d", &at("inherits"));
    fs::write(at("inherits/file"), "inherits").unwrap();
    fs::create_dir(at("inherits/none")).unwrap();
    chattr("-d", &at("inherits/none"));
    for (name, flags) in [("immutable", "+i"), ("append", "+a")] {
        fs::create_dir(at(name)).unwrap();
        for inner in ["linked", "doomed", "changed"] {
            fs::write(at(name).join(inner), inner).unwrap();
        }
        fs::hard_link(at(name).join("linked"), at("links").join(name)).unwrap();
        for inner in ["linked", "doomed", "changed"] {
            chattr(flags, &at(name).join(inner));
        }
        chattr(flags, &at(name));
    }
    deep(root, 20);
    // Times last.
    touch("2001-09-09 01:46:40.999999999", &at("times"));
    touch("1960-01-01 00:00:00.000000001", &at("empty"));
}

/// The directory `levels` names of 250 bytes below `root`, made and held open;
/// by way of this descriptor it has a path that fits.
fn deep(root: &Path, levels: usize) -> PathBuf {
    let mut at = root.join("deep");
    let _ = fs::create_dir(&at);
    for _ in 0..levels {
        let held = fs::File::open(&at).unwrap();
        // It is held for as long as the test runs.
        let held = std::os::fd::IntoRawFd::into_raw_fd(held);
        at = PathBuf::from(format!("/proc/self/fd/{held}/{}", "d".repeat(250)));
        let _ = fs::create_dir(&at);
    }
    at
}

#[test]
fn everything_that_a_file_can_have_is_copied_and_changed_on_either_side() {
    let Some(mut freed) = pair("everything_that_a_file_can_have_is_copied") else {
        return;
    };
    let pair = &mut freed.0;
    make(&pair.one.share);
    fs::write(deep(&pair.one.share, 20).join("file"), "deep").unwrap();
    let started = Instant::now();
    pair.start();
    settle_exact(pair);
    println!("the tree is copied after {:?}", started.elapsed());
    let blocks = fs::metadata(pair.two.share.join("sparse")).unwrap().blocks();
    assert!(blocks * 512 < 1 << 20, "{blocks} blocks");
    assert_eq!(
        pair.two.status().unwrap()["shares"][0]["lacking"],
        serde_json::json!([])
    );

    // Back from the other side, while nobody looks: not every kernel tells of
    // `chattr`.
    pair.two.stop();
    let two = pair.two.share.clone();
    for name in ["immutable", "append"] {
        let dir = two.join(name);
        run("chattr", &["-R", "-i", "-a"], &dir);
        fs::remove_file(dir.join("doomed")).unwrap();
        fs::write(dir.join("changed"), "changed on two").unwrap();
        fs::write(dir.join("new"), "new").unwrap();
        fs::rename(dir.join("linked"), dir.join("renamed")).unwrap();
        let flag = if name == "immutable" { "+i" } else { "+a" };
        for inner in ["changed", "renamed"] {
            chattr(flag, &dir.join(inner));
        }
        chattr(flag, &dir);
    }
    chattr("-d", &two.join("nodump"));
    chattr("=", &two.join("sync"));
    chattr("+i", &two.join("empty"));
    fs::OpenOptions::new()
        .write(true)
        .open(two.join("sparse"))
        .unwrap()
        .write_all_at(b"more", 1 << 38)
        .unwrap();
    fs::write(deep(&two, 20).join("file"), "changed on two").unwrap();
    fs::write(deep(&two, 20).join("second"), "made on two").unwrap();
    pair.two.start();
    settle_exact(pair);

    // And while they run.
    let one = pair.one.share.clone();
    fs::remove_file(one.join("links/a/first")).unwrap();
    fs::write(one.join("links/a/first"), "split").unwrap();
    fs::hard_link(two.join("links/b/second"), two.join("acl/third")).unwrap();
    fs::write(two.join("links/b/second"), "edited beside").unwrap();
    run("setfacl", &["-k"], &two.join("acl"));
    setfattr(
        "security.selinux",
        "system_u:object_r:tmp_t:s0",
        &one.join("attributes"),
    );
    run("setfattr", &["-x", "trusted.omirr"], &one.join("attributes"));
    fs::remove_file(deep(&one, 20).join("file")).unwrap();
    fs::write(deep(&one, 30).join("third"), "deeper").unwrap();
    fs::rename(deep(&two, 20).join("second"), two.join("from the deep")).unwrap();
    settle_exact(pair);
    // Gone from one side, gone from the other.
    fs::remove_dir_all(one.join("deep")).unwrap();
    settle_exact(pair);
    assert!(!two.join("deep").exists());
}

#[test]
fn a_crash_between_unlocking_and_locking_again_is_no_change() {
    let Some(mut freed) = pair("a_crash_between_unlocking_and_locking_again") else {
        return;
    };
    let pair = &mut freed.0;
    let one = pair.one.share.clone();
    fs::create_dir(one.join("locked")).unwrap();
    for n in 0..300 {
        fs::write(one.join(format!("locked/{n}")), format!("{n}")).unwrap();
    }
    run("chattr", &["-R", "+i"], &one.join("locked"));
    pair.start();
    settle_exact(pair);
    for round in 0..2u64 {
        pair.one.stop();
        run("chattr", &["-R", "-i"], &one.join("locked"));
        for n in (0..300).filter(|n| n % 4 == round) {
            fs::remove_file(one.join(format!("locked/{n}"))).unwrap();
            fs::write(one.join(format!("locked/{n}-new")), format!("{n}")).unwrap();
        }
        run("chattr", &["-R", "+i"], &one.join("locked"));
        pair.one.start();
        // In the midst of it: the directory is open to changes there.
        let deadline = Instant::now() + LONG;
        while is_immutable(&pair.two.share.join("locked")) {
            assert!(Instant::now() < deadline, "{}", pair.two.log_tail());
        }
        pair.two.kill();
        pair.two.start();
        settle_exact(pair);
    }
    let cut_off = pair.two.log_text().matches("the last run was cut off").count();
    println!("{cut_off} of 2 kills came while rows were being applied");
    assert!(cut_off > 0, "{}", pair.two.log_tail());
}

fn is_immutable(path: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
    let stat = statx(CWD, path, AtFlags::empty(), StatxFlags::empty()).unwrap();
    stat.stx_attributes.contains(StatxAttributes::IMMUTABLE)
}

/// Lets the node's daemon see users and groups of its own.
fn with_users(node: &mut Node, users: &[(&str, u32)]) {
    let lines = |tail: &str| {
        let lines = users.iter().map(|(name, id)| format!("{name}:x:{id}:{tail}\n"));
        format!("root:x:0:{tail}\n{}", lines.collect::<String>())
    };
    let (passwd, group) = (node.folder.join("passwd"), node.folder.join("group"));
    fs::write(&passwd, lines("0::/:/bin/false")).unwrap();
    fs::write(&group, lines("")).unwrap();
    let script = format!(
        "mount --bind {} /etc/passwd && mount --bind {} /etc/group && exec \"$0\" \"$@\"",
        passwd.display(),
        group.display()
    );
    node.launcher = Some(Box::new(move |binary| {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &script]).arg(binary);
        command
    }));
}

fn owner(node: &Node, name: &str) -> (u32, u32) {
    let meta = fs::symlink_metadata(node.share.join(name)).unwrap();
    (meta.uid(), meta.gid())
}

#[test]
fn owners_go_by_name_and_by_number_where_there_is_none() {
    let Some(mut freed) = pair("owners_go_by_name_and_by_number_where_there_is_none") else {
        return;
    };
    let pair = &mut freed.0;
    with_users(&mut pair.one, &[("anna", 4141), ("bert", 4142)]);
    with_users(&mut pair.two, &[("anna", 5151), ("carl", 4142), ("toor", 0)]);
    for (name, id) in [("annas", 4141), ("berts", 4142), ("roots", 0), ("nobodys", 4999)] {
        fs::write(pair.one.share.join(name), name).unwrap();
        chown(pair.one.share.join(name), Some(id), Some(id)).unwrap();
    }
    fs::set_permissions(pair.one.share.join("annas"), fs::Permissions::from_mode(0o6755)).unwrap();
    symlink("annas", pair.one.share.join("link")).unwrap();
    lchown(pair.one.share.join("link"), Some(4141), Some(4141)).unwrap();
    pair.start();
    pair.settle(LONG);
    let expected = [("annas", 5151), ("berts", 4142), ("roots", 0), ("nobodys", 4999)];
    for (name, id) in expected {
        assert_eq!(owner(&pair.two, name), (id, id), "{name}");
    }
    let made = pair.two.stats()["shares"][0]["rows_made"].clone();
    // Whatever else is changed there, the owner is still anna; and a comparison
    // after a restart finds no change either.
    fs::write(pair.two.share.join("annas"), "changed").unwrap();
    fs::set_permissions(pair.two.share.join("annas"), fs::Permissions::from_mode(0o6755)).unwrap();
    setfattr("user.a", "b", &pair.two.share.join("berts"));
    pair.settle(LONG);
    pair.two.stop();
    pair.two.start();
    pair.settle(LONG);
    println!(
        "rows made on two: {made}, then {}",
        pair.two.stats()["shares"][0]["rows_made"]
    );
    assert_eq!(pair.two.stats()["shares"][0]["rows_made"], 0);
    assert_eq!(owner(&pair.one, "annas"), (4141, 4141));
    assert_eq!(
        fs::read_to_string(pair.one.share.join("annas")).unwrap(),
        "changed"
    );
    let mode = |node: &Node| fs::metadata(node.share.join("annas")).unwrap().mode() & 0o7777;
    assert_eq!((mode(&pair.one), mode(&pair.two)), (0o6755, 0o6755));
    // A new owner there is a change, by name again.
    chown(pair.two.share.join("roots"), Some(5151), None).unwrap();
    chown(pair.two.share.join("annas"), Some(4142), None).unwrap();
    pair.settle(LONG);
    assert_eq!(owner(&pair.one, "roots"), (4141, 0));
    assert_eq!(owner(&pair.one, "annas"), (4142, 4141));
    assert_eq!(
        pair.two.status().unwrap()["shares"][0]["lacking"],
        serde_json::json!([])
    );
    // By number, if that is asked for.
    pair.one.stop();
    pair.two.stop();
    pair.two.share_options = "owners = \"numbers\"".to_owned();
    pair.start();
    fs::write(pair.one.share.join("late"), "late").unwrap();
    chown(pair.one.share.join("late"), Some(4141), Some(4141)).unwrap();
    pair.settle(LONG);
    assert_eq!(owner(&pair.two, "late"), (4141, 4141));
}

/// The `lacking` of a node's status, as `(entries, reason)`.
fn lacking(node: &Node) -> Vec<(u64, String)> {
    let status = node.status().expect("the daemon answers");
    let lacking = status["shares"][0]["lacking"].as_array().unwrap().clone();
    let text = |one: &serde_json::Value| one["reason"].as_str().unwrap().to_owned();
    lacking
        .iter()
        .map(|one| (one["entries"].as_u64().unwrap(), text(one)))
        .collect()
}

#[test]
fn what_a_node_cannot_have_is_counted_there_and_stays_with_the_others() {
    let Some(mut freed) = pair("what_a_node_cannot_have_is_counted_there") else {
        return;
    };
    let pair = &mut freed.0;
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    pair.two.share = memory.path().join("share");
    fs::create_dir(&pair.two.share).unwrap();
    chown(memory.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    chown(&pair.two.share, Some(NOBODY), Some(NOBODY)).unwrap();
    fs::set_permissions(pair.base(), fs::Permissions::from_mode(0o755)).unwrap();
    pair.two.without_privileges(NOBODY);
    let file = pair.one.share.join("file");
    fs::write(&file, "of one").unwrap();
    chown(&file, Some(1234), Some(1234)).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o4750)).unwrap();
    setfattr("trusted.a", "for root", &file);
    setfattr("user.b", "for all", &file);
    touch("2001-02-03 04:05:06.123456789", &file);
    chattr("+Si", &file);
    fs::write(pair.one.share.join("plain"), "of one").unwrap();
    chown(pair.one.share.join("plain"), Some(NOBODY), Some(NOBODY)).unwrap();
    chown(&pair.one.share, Some(NOBODY), Some(NOBODY)).unwrap();
    // Of the root only what the nodes agree on can be said.
    let walk = |node: &Node| {
        let mut tree = omirr_tests::treewalk::walk(&node.share).unwrap();
        tree.remove(Path::new(""));
        tree
    };
    let before = walk(&pair.one);
    pair.start();
    pair.settle(LONG);
    let there = pair.two.share.join("file");
    let meta = fs::metadata(&there).unwrap();
    // No set-id bit for another owner.
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (NOBODY, 0o750));
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (981_173_106, 123_456_789));
    assert_eq!(fs::read_to_string(&there).unwrap(), "of one");
    assert!(run("getfattr", &["-d"], &there).contains("user.b=\"for all\""));
    let found = lacking(&pair.two);
    println!("{}", pair.two.status_text());
    for part in ["CAP_CHOWN", "trusted.*", "the flag 'S'", "CAP_LINUX_IMMUTABLE"] {
        let of = found
            .iter()
            .filter(|(entries, why)| *entries == 1 && why.contains(part));
        assert_eq!(of.count(), 1, "{part} in {found:?}");
    }
    let said = pair.two.log_text().matches("CAP_CHOWN").count();
    assert_eq!(said, 1, "{}", pair.two.log_tail());
    assert_eq!(omirr_tests::treewalk::diff(&before, &walk(&pair.one)), [""; 0]);
    // What is changed there comes back without what could not be had there.
    fs::write(&there, "of two").unwrap();
    pair.two.stop();
    pair.two.start();
    pair.one.wait_for_file("file", "of two", LONG);
    pair.settle(LONG);
    let meta = fs::metadata(&file).unwrap();
    assert_eq!(
        (meta.uid(), meta.mode() & 0o7777),
        (1234, 0o4750),
        "{}",
        pair.one.log_tail()
    );
    let attributes = run("getfattr", &["-d", "-m", "-"], &file);
    assert!(
        attributes.contains("trusted.a") && attributes.contains("user.b"),
        "{attributes}"
    );
    assert!(run("lsattr", &[], &file).starts_with("--S-i"));
    // Gone is gone from the count, too.
    chattr("=", &file);
    fs::remove_file(&file).unwrap();
    pair.settle(LONG);
    let left = [file.exists(), there.exists()];
    assert_eq!(
        left,
        [false; 2],
        "{}\n{}",
        pair.one.log_tail(),
        pair.two.log_tail()
    );
    assert_eq!(lacking(&pair.two), []);
}

#[test]
fn one_directory_holds_as_many_names_as_anybody_puts_there() {
    let Some(mut freed) = pair("one_directory_holds_as_many_names_as_anybody_puts_there") else {
        return;
    };
    let pair = &mut freed.0;
    let entries = std::env::var("OMIRR_EXACT_ENTRIES").map_or(5_000, |number| number.parse().unwrap());
    let folder = pair.one.share.join("folder");
    fs::create_dir(&folder).unwrap();
    pair.start();
    pair.settle(LONG);
    let patience = LONG + Duration::from_millis(entries * 5);
    let timed = |pair: &mut Pair, what: &str, started: Instant| {
        pair.settle(patience);
        let mib = |node: &Node| node.resident_bytes() >> 20;
        println!(
            "{entries} names, {what}: {:?}; {} and {} MiB",
            started.elapsed(),
            mib(&pair.one),
            mib(&pair.two)
        );
    };
    let started = Instant::now();
    for n in 0..entries {
        fs::write(folder.join(n.to_string()), []).unwrap();
    }
    timed(pair, "made", started);
    assert_eq!(
        fs::read_dir(pair.two.share.join("folder")).unwrap().count() as u64,
        entries
    );
    pair.assert_equal();
    let started = Instant::now();
    fs::rename(
        pair.two.share.join("folder/7"),
        pair.two.share.join("folder/seven"),
    )
    .unwrap();
    timed(pair, "one of them renamed", started);
    assert!(pair.one.share.join("folder/seven").exists());
    let started = Instant::now();
    fs::remove_dir_all(&folder).unwrap();
    timed(pair, "removed", started);
    assert!(!pair.two.share.join("folder").exists());
}
