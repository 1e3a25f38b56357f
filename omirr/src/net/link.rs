//! How fast the kernel finds a connection to be.
//!
//! In: a connected TCP socket. Out: its delivery rate, which is what decides
//! how much work compressing is worth.
#![expect(unsafe_code, reason = "TCP_INFO has no safe wrapper")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// From so many bytes a second on, a connection is done with the bytes sooner
/// than zstd with making them fewer: zstd's fastest levels take in 200 to 500
/// MB/s on one core.
const FAST_BYTES_PER_S: u64 = 250 << 20;

/// Below so many bytes a second a connection takes longer to carry bytes than one
/// core to make them a few percent fewer. Somewhat more than 100 Mbit/s.
const SLOW_BYTES_PER_S: u64 = 16 << 20;

/// Of `struct tcp_info` in linux/tcp.h (Linux 4.9 and newer):
/// `tcpi_delivery_rate`, a `u64` in the machine's byte order, bytes a second.
const DELIVERY_RATE: std::ops::Range<usize> = 160..168;

/// What a connection's bytes are worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// They had better go as they are.
    Fast,
    /// They are worth compressing.
    Usual,
    /// They are worth compressing with much work.
    Slow,
}

/// A connection's socket, for asking about it.
#[derive(Debug)]
pub(super) struct Link(Option<OwnedFd>);

impl Link {
    /// If the descriptor cannot be copied, the link is of the usual pace.
    pub(super) fn of(socket: &impl AsFd) -> Link {
        Link(socket.as_fd().try_clone_to_owned().ok())
    }

    /// What the kernel has seen of it. A connection that has not yet carried
    /// anything is of the usual pace.
    pub(super) fn pace(&self) -> Pace {
        let rate = self.0.as_ref().and_then(|socket| delivery_rate(socket.as_fd()));
        match rate {
            Some(FAST_BYTES_PER_S..) => Pace::Fast,
            Some(1..SLOW_BYTES_PER_S) => Pace::Slow,
            _ => Pace::Usual,
        }
    }
}

/// The rate at which the other side's kernel was last seen to take bytes in,
/// however slowly its program reads them: `tcp_rate_gen` in
/// net/ipv4/tcp_rate.c. None where the kernel does not tell.
fn delivery_rate(socket: BorrowedFd<'_>) -> Option<u64> {
    let mut info = [0u8; DELIVERY_RATE.end];
    let mut len = info.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `info`, which has as
    // many, and how many it wrote to `len`; both live until the call returns.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if done != 0 || (len as usize) < info.len() {
        return None;
    }
    Some(u64::from_ne_bytes(info[DELIVERY_RATE].try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_kernel_tells_how_fast_loopback_is() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut two, _) = listener.accept().unwrap();
        let reading = std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 20];
            while two.read(&mut buffer).unwrap() > 0 {}
        });
        one.write_all(&vec![1; 32 << 20]).unwrap();
        let rate = delivery_rate(one.as_fd()).unwrap();
        // Not how much: the machine may be busy.
        assert!(rate > 1 << 20, "{rate} bytes a second");
        drop(one);
        reading.join().unwrap();
    }

    #[test]
    fn what_is_no_tcp_socket_is_of_the_usual_pace() {
        assert_eq!(Link::of(&std::io::stdin()).pace(), Pace::Usual);
    }
}
