//! Services that users name: what is refused, how long and how much we listen, and what is asked for again.

use std::time::{Duration, Instant};

use attune::outbound::{Host, HostKey, Reach, Web, WebSettings};
use axum::{
    Json,
    body::{Body, Bytes},
    http::StatusCode,
    response::{IntoResponse, Redirect, Response},
};
use serde_json::{Value, json};

use crate::support::elsewhere::Elsewhere;

fn web(allowed: &[&str], keys: &[String]) -> Web {
    let reach = Reach {
        allowed: allowed.iter().map(|host| Host::parse(host).unwrap()).collect(),
        keys: keys.iter().map(|key| HostKey::parse(key).unwrap()).collect(),
    };
    let (timeout, pause) = (Duration::from_millis(400), Duration::from_millis(5));
    Web::new(WebSettings { reach, timeout, attempts: 3, pause }).unwrap()
}

fn score(answer: &Value) -> Result<f64, String> {
    answer["score"].as_f64().ok_or_else(|| "no score".to_owned())
}

async fn ask(web: &Web, url: &str) -> Result<f64, String> {
    web.ask(url, &json!({"a": 1}), score).await.map_err(|error| error.to_string())
}

#[tokio::test]
async fn passing_faults_and_nonsense_are_asked_for_again() {
    let fine = || Json(json!({"score": 0.5})).into_response();
    let site = Elsewhere::start(move |n, _| async move {
        match n {
            0 => (StatusCode::SERVICE_UNAVAILABLE, [("retry-after", "0")]).into_response(),
            1 => "no json".into_response(),
            _ => fine(),
        }
    })
    .await;
    let key = format!("{}=secret", site.host);
    let web = web(&[&site.host], &[key]);
    assert_eq!(ask(&web, &site.url("/judge")).await, Ok(0.5));
    let asked = site.asked();
    assert_eq!(asked.len(), 3);
    for one in asked {
        assert_eq!(
            (one.path.as_str(), one.key.as_deref(), &one.body),
            ("/judge", Some("Bearer secret"), &json!({"a": 1}))
        );
    }
    // What stays nonsense is an error, after as many attempts; what will not pass is asked once.
    let site = Elsewhere::start(|_, asked| async move {
        match asked.path.as_str() {
            "/odd" => Json(json!({"points": 1})).into_response(),
            _ => StatusCode::BAD_REQUEST.into_response(),
        }
    })
    .await;
    let web = self::web(&[&site.host], &["other.example=secret".to_owned()]);
    assert_eq!(ask(&web, &site.url("/odd")).await, Err("no score (3 attempts)".to_owned()));
    assert_eq!(ask(&web, &site.url("/x")).await, Err("127.0.0.1 answers 400 Bad Request".to_owned()));
    let asked = site.asked();
    assert_eq!(asked.len(), 4);
    assert!(asked.iter().all(|one| one.key.is_none()), "another host's key is shown: {asked:?}");
}

#[tokio::test]
async fn time_and_size_are_ours() {
    let endless = || {
        let part = Bytes::from(vec![b' '; 64 << 10]);
        Response::new(Body::from_stream(futures::stream::repeat_with(move || Ok::<_, std::io::Error>(part.clone()))))
    };
    let slowly = || {
        let drop = async |n: u32| {
            tokio::time::sleep(Duration::from_millis(100)).await;
            Some((Ok::<_, std::io::Error>(Bytes::from_static(b" ")), n + 1))
        };
        Response::new(Body::from_stream(futures::stream::unfold(0, drop)))
    };
    let site = Elsewhere::start(move |_, asked| async move {
        match asked.path.as_str() {
            "/endless" => endless(),
            "/drops" => slowly(),
            _ => {
                tokio::time::sleep(Duration::from_secs(60)).await;
                StatusCode::OK.into_response()
            }
        }
    })
    .await;
    let web = web(&[&site.host], &[]);
    let begun = Instant::now();
    assert_eq!(
        ask(&web, &site.url("/endless")).await,
        Err("127.0.0.1 answers with more than 1048576 bytes".to_owned())
    );
    for path in ["/silent", "/drops"] {
        let error = ask(&web, &site.url(path)).await.unwrap_err();
        assert_eq!(error, "127.0.0.1: no answer in time (3 attempts)", "{path}");
    }
    assert_eq!(site.asked().len(), 7);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

/// Where a public host could send us: nowhere.
#[tokio::test]
async fn redirects_are_not_followed() {
    let inside = Elsewhere::start(|_, _| async { Json(json!({"score": 1.0})).into_response() }).await;
    let target = inside.url("/latest/meta-data");
    let site = Elsewhere::start(move |n, _| {
        let target = target.clone();
        async move {
            match n {
                0 => Redirect::temporary(&target).into_response(),
                1 => Redirect::permanent("http://169.254.169.254/latest").into_response(),
                _ => Redirect::to("/again").into_response(),
            }
        }
    })
    .await;
    let web = web(&[&site.host, &inside.host], &[]);
    for _ in 0..3 {
        let error = ask(&web, &site.url("/")).await.unwrap_err();
        assert!(error.contains("redirect"), "{error}");
    }
    assert_eq!((site.asked().len(), inside.asked().len()), (3, 0));
}

#[tokio::test]
async fn private_addresses_are_not_reached() {
    let site = Elsewhere::start(|_, _| async { Json(json!({"score": 1.0})).into_response() }).await;
    let port = site.host.rsplit(':').next().unwrap();
    // Another port of an allowed host is another host.
    let web = web(&["127.0.0.1:1", "localhost:1"], &[]);
    for address in [
        site.url("/"),
        format!("https://127.0.0.1:{port}/"),
        format!("https://[::ffff:127.0.0.1]:{port}/"),
        format!("https://0x7f000001:{port}/"),
        format!("https://u:p@127.0.0.1:{port}/"),
        "https://169.254.169.254/latest".to_owned(),
    ] {
        assert!(web.check(&address).is_err(), "{address}");
        assert!(ask(&web, &address).await.is_err(), "{address}");
    }
    // A name is refused by what it resolves to, when it is resolved.
    let name = format!("https://localhost:{port}/");
    assert!(web.check(&name).is_ok());
    let error = ask(&web, &name).await.unwrap_err();
    assert!(error.contains("localhost is not at a public address"), "{error}");
    assert!(!error.contains("attempts"), "it was tried again: {error}");
    assert!(site.asked().is_empty());
}
