//! An NFS server in the kernel, and a client of it, without any daemon: what
//! `mountd` would answer is told to the kernel beforehand, and `rpcbind`, which
//! the server registers with although nobody asks it, is a few lines here.
//!
//! In: places. Out: for each, where its share is mounted as a client has it, or
//! why it is not.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount, mount_bind};

use crate::place::Place;

const ROOT: &str = "/run/coverage-exports";
/// No entry of the kernel's caches expires during a test.
const NEVER: &str = "2147483647";
/// `NFSEXP_NOSUBTREECHECK`, `NFSEXP_FSID`, `NFSEXP_CROSSMOUNT`, `NFSEXP_INSECURE_PORT`.
const FLAGS: u32 = 0x400 | 0x2000 | 0x4000 | 0x2;

pub fn export(places: &mut [Place]) {
    let started = start(places);
    for place in places.iter_mut().filter(|place| place.outside.is_some()) {
        place.nfs = match &started {
            Ok(()) => client(place).map_err(|error| format!("the share cannot be mounted by NFS: {error:#}")),
            Err(error) => Err(format!("there is no NFS server: {error:#}")),
        };
    }
}

fn tell(path: &str, words: &str) -> Result<()> {
    fs::write(path, words).with_context(|| format!("{path}: {}", words.trim_end()))
}

fn start(places: &[Place]) -> Result<()> {
    fs::create_dir_all(ROOT)?;
    mount("tmpfs", ROOT, "tmpfs", MountFlags::empty(), None).context("the exports' root")?;
    mount("nfsd", "/proc/fs/nfsd", "nfsd", MountFlags::empty(), None).context("/proc/fs/nfsd")?;
    std::thread::spawn(rpcbind);
    tell(
        "/proc/net/rpc/auth.unix.ip/channel",
        &format!("nfsd 127.0.0.1 {NEVER} clients\n"),
    )?;
    let exported = places.iter().filter(|place| place.outside.is_some());
    let mut folders = vec![PathBuf::from(ROOT)];
    for place in exported {
        let folder = Path::new(ROOT).join(&place.name);
        fs::create_dir_all(&folder)?;
        mount_bind(&place.share, &folder)?;
        folders.push(folder);
    }
    for (number, folder) in (0_u32..).zip(&folders) {
        let folder = folder.display();
        tell(
            "/proc/net/rpc/nfsd.export/channel",
            &format!("clients {folder} {NEVER} {FLAGS} 65534 65534 {number}\n"),
        )?;
        // By number: the first four bytes of the handle's identity.
        let id: String = number
            .to_ne_bytes()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        tell(
            "/proc/net/rpc/nfsd.fh/channel",
            &format!("clients 1 \\x{id} {NEVER} {folder}\n"),
        )?;
    }
    tell("/proc/fs/nfsd/versions", "-2 -3 +4 +4.1 +4.2\n")
        .or_else(|_| tell("/proc/fs/nfsd/versions", "-3 +4 +4.1 +4.2\n"))?;
    for grace in ["nfsv4gracetime", "nfsv4leasetime"] {
        tell(&format!("/proc/fs/nfsd/{grace}"), "10\n")?;
    }
    tell("/proc/fs/nfsd/portlist", "tcp 2049\n")?;
    tell("/proc/fs/nfsd/threads", "2\n")?;
    // Nobody has anything to reclaim. A kernel that refuses is waited for: its
    // clients ask again until the time of grace is over.
    if let Err(error) = tell("/proc/fs/nfsd/v4_end_grace", "Y\n") {
        eprintln!("{error:#}");
    }
    Ok(())
}

fn client(place: &Place) -> Result<PathBuf> {
    let at = Path::new("/run/coverage-nfs").join(&place.name);
    fs::create_dir_all(&at)?;
    let source = format!("127.0.0.1:/{}", place.name);
    let options = c"vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1,proto=tcp,soft,timeo=50,retrans=1";
    mount(source.as_str(), &at, "nfs4", MountFlags::empty(), Some(options)).context(source)?;
    Ok(at)
}

/// Says yes to whatever is registered.
fn rpcbind() {
    let Ok(listener) = TcpListener::bind(("127.0.0.1", 111)) else {
        return;
    };
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || while answer(&stream).is_ok() {});
    }
}

/// One call and its answer: the mark of a record and its length, then the call's
/// number, 1 (an answer), 0 (accepted), no credentials, 0 (success), 1 (yes).
fn answer(mut stream: &TcpStream) -> std::io::Result<()> {
    let mut mark = [0; 4];
    stream.read_exact(&mut mark)?;
    let len = u32::from_be_bytes(mark) & 0x7fff_ffff;
    let mut call = vec![0; (len as usize).max(24)];
    stream.read_exact(&mut call[..len as usize])?;
    let number = u32::from_be_bytes([call[0], call[1], call[2], call[3]]);
    let procedure = u32::from_be_bytes([call[20], call[21], call[22], call[23]]);
    let mut words = vec![number, 1, 0, 0, 0, 0];
    // Procedure 0 has no result.
    words.extend((procedure != 0).then_some(1));
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
    let mark = 0x8000_0000 | u32::try_from(bytes.len()).unwrap_or(0);
    stream.write_all(&[&mark.to_be_bytes()[..], &bytes].concat())
}
