//! Models that write their calls in a form of their own: their templates, their grammar, their parser.
//!
//! The engine is a double that says what such a model would say, token by token, and holds itself to the guide as a real
//! one has to.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{
    VOICE, run,
    torn::{self, Torn},
};
use electron_gateway::{
    electron::Electron,
    turn::{
        FillerPolicy, FinishReason, Message, Model, OutputFormat, Sampling, Tool, ToolCall, ToolChoice, Turn, TurnEvent,
    },
};
use futures::StreamExt;
use serde_json::json;

/// A model with this template that says these words.
fn electron(template: &str, says: &'static [&'static str]) -> Arc<Electron> {
    let model = torn::model(template);
    let says = says.iter().flat_map(|piece| model.vocabulary.encode(piece).unwrap()).collect();
    Arc::new(Electron::new(Arc::new(Torn::new(&model, vec![(says, 1.0)])), 0).unwrap())
}

fn turn(filler: FillerPolicy) -> Turn {
    let parameters = json!({"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]});
    let call = ToolCall { id: "c1".into(), name: "find".into(), arguments: "{\"id\": \"7\"}".into() };
    Turn {
        messages: vec![
            Message::System(VOICE.into()),
            Message::User("Where is order 7?".into()),
            Message::Assistant { content: None, tool_calls: vec![call] },
            Message::Tool { call_id: "c1".into(), content: "on its way".into() },
            Message::User("And order 8 and 9?".into()),
        ],
        tools: [Tool { name: "find".into(), description: None, parameters, phrase: Default::default() }].into(),
        tool_choice: ToolChoice::Auto,
        parallel_tool_calls: true,
        sampling: Sampling::default(),
        format: OutputFormat::Text,
        filler,
        language: None,
        whole: false,
    }
}

const LLAMA3: &str = "{% if tools %}<|python_tag|> {% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}\
    {% for m in messages %}[{{ m.role }}]{% if m.tool_calls %}{% for c in m.tool_calls %}{\"name\": \"{{ c.function.name }}\", \
    \"parameters\": {{ c.function.arguments | tojson }}}{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
const MISTRAL: &str = "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% for m in messages %}{% if m.tool_calls %}\
    [TOOL_CALLS][{% for c in m.tool_calls %}{\"name\": \"{{ c.function.name }}\", \"arguments\": \
    {{ c.function.arguments | tojson }}}{% endfor %}]{% else %}{{ m.content }}{% endif %}{% endfor %}";
const HERMES: &str = "{% for m in messages %}{{ m.content }}{% endfor %}";

/// Text, the calls with their arguments, and why the turn ended.
async fn events(electron: &Arc<Electron>, turn: Turn) -> (String, Vec<(String, String)>, FinishReason) {
    let mut stream = electron.clone().turn(turn).await.unwrap();
    let (mut text, mut calls) = (String::new(), Vec::<(String, String)>::new());
    loop {
        match stream.next().await.unwrap().unwrap() {
            TurnEvent::Text { delta, .. } => {
                assert!(calls.is_empty(), "text came behind a call");
                text.push_str(&delta);
            }
            TurnEvent::CallBegun { name, .. } => calls.push((name, String::new())),
            TurnEvent::Arguments { index, delta } => calls[index].1.push_str(&delta),
            TurnEvent::CallEnded { .. } => {}
            TurnEvent::Finished { reason, .. } => return (text, calls, reason),
        }
    }
}

#[test]
fn each_form_is_read_as_its_model_writes_it() {
    run(async {
        let find = |id: &str| ("find".to_owned(), format!("{{\"id\": \"{id}\"}}"));
        for (template, says) in [
            (
                LLAMA3,
                &[
                    "{\"name\": \"",
                    "find\", \"parameters\": {\"id\": \"8\"}}; {\"name\": \"find\", \"parameters\": {\"id\": \"9\"}}",
                ][..],
            ),
            (
                MISTRAL,
                &[
                    "[TOOL_CALLS]",
                    "[{\"name\": \"find\", \"arguments\": {\"id\": \"8\"}}, {\"name\": \"find\", \"arguments\": {\"id\": \"9\"}}]",
                ],
            ),
            (
                HERMES,
                &[
                    "<tool_call>",
                    "\n{\"name\": \"find\", \"arguments\": {\"id\": \"8\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"find\", \"arguments\": {\"id\": \"9\"}}\n</tool_call>",
                ],
            ),
        ] {
            let electron = electron(template, says);
            let (text, calls, reason) = events(&electron, turn(FillerPolicy::Auto)).await;
            assert!(!text.is_empty(), "the book spoke first");
            assert_eq!(calls, [find("8"), find("9")], "{template}");
            assert_eq!(reason, FinishReason::ToolCalls);
            let (text, ..) = events(&electron, turn(FillerPolicy::Never)).await;
            assert_eq!(text, "");
        }
    });
}

#[test]
fn a_model_that_speaks_for_itself_is_not_spoken_over() {
    run(async {
        let says =
            &["I will look.\n", "<tool_call>", "\n{\"name\": \"find\", \"arguments\": {\"id\": \"8\"}}\n</tool_call>"];
        let (text, calls, _) = events(&electron(HERMES, says), turn(FillerPolicy::Auto)).await;
        assert_eq!((text.as_str(), calls.len()), ("I will look.", 1));
    });
}

#[test]
fn templates_with_tools_get_them_and_others_get_a_section() {
    let rendered = |template| electron(template, &[]).render(&turn(FillerPolicy::Auto)).unwrap();
    let llama = rendered(LLAMA3);
    assert!(
        llama.contains("\"type\": \"function\"")
            && llama.contains("{\"name\": \"find\", \"parameters\": {\"id\": \"7\"}}")
    );
    assert!(llama.contains("[tool]on its way"));
    assert!(rendered(MISTRAL).contains("[TOOL_CALLS][{\"name\": \"find\", \"arguments\": {\"id\": \"7\"}}]"));
    let plain = rendered(HERMES);
    assert!(
        plain.contains("\nfind(id: string)")
            && plain.contains("<tool_call>\n{\"name\": \"find\", \"arguments\": {\"id\": \"7\"}}\n</tool_call>")
    );
    assert!(plain.contains("<tool_response>\non its way\n</tool_response>"));
}
