//! Addresses to dial and to listen on.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// A TCP server that answers each connection with `answer`; nothing means that
/// it hangs up.
async fn answering(answer: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            drop(tcp.read(&mut [0; 4096]).await);
            drop(tcp.write_all(answer).await);
        }
    });
    at
}

#[tokio::test]
async fn dialling_says_why_it_failed() {
    let (local, key) = (identity(), identity().public_key());
    let said = async |address: &str, timeout| {
        dial(address, &local, &key, timeout)
            .await
            .unwrap_err()
            .to_string()
    };

    let closed = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    assert_eq!(
        said(&closed, SOON).await,
        format!(
            "{closed} refused the connection: nothing listens there; is omirr running on that node, at that port?"
        )
    );
    let http = answering(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.to_string();
    assert!(
        said(&http, SOON)
            .await
            .starts_with(&format!("{http} does not speak omirr's protocol"))
    );
    let rude = answering(b"").await.to_string();
    assert_eq!(
        said(&rude, SOON).await,
        format!("{rude} hung up during the handshake")
    );

    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_at = silent.local_addr().unwrap().to_string();
    assert_eq!(
        said(&silent_at, Duration::from_millis(200)).await,
        format!("{silent_at} did not answer within 0.2 s during the handshake")
    );
    for (wrong, why) in [
        ("web2", "it needs a host and a port"),
        (":808", "it needs a host and a port"),
        ("fd00::2", "it needs a host and a port"),
        ("web2:http", "\"http\" is no port"),
        ("web2:70000", "\"70000\" is no port"),
    ] {
        let error = said(wrong, SOON).await;
        assert!(
            error.starts_with(&format!("{wrong:?} is no address to dial: {why}")),
            "{error}"
        );
    }
    let error = said("no-such-host.invalid:808", SOON).await;
    assert!(
        error.starts_with("the name in no-such-host.invalid:808 cannot be resolved"),
        "{error}"
    );
}

#[tokio::test]
async fn listening_says_why_it_failed() {
    let said = async |address: &str| {
        Listener::bind(&[address.to_owned()])
            .await
            .unwrap_err()
            .to_string()
    };
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = taken.local_addr().unwrap();
    let error = said(&at.to_string()).await;
    assert!(
        error.starts_with(&format!(
            "cannot listen on {at}: another program, or another omirr"
        )),
        "{error}"
    );
    assert!(
        error.contains(&format!("ss -ltnp sport = :{}", at.port())),
        "{error}"
    );
    let error = said("192.0.2.1:8080").await;
    assert!(
        error.contains("this host does not have the address 192.0.2.1"),
        "{error}"
    );
    let error = said("nonsense").await;
    assert!(
        error.starts_with("cannot listen on nonsense: ") && error.contains("0.0.0.0:808"),
        "{error}"
    );
    let error = Listener::bind(&[]).await.unwrap_err().to_string();
    assert!(error.contains("set `listen` under [node]"), "{error}");
    let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
    let error = crate::net::listener::explain(&denied, "0.0.0.0:808".parse().unwrap());
    assert!(error.contains("ports below 1024 need a privilege"), "{error}");
}
