// Publish a job: `go run publisher.go GENERATION_ID PROMPT ['{"seed": 7, …}']`. Prints its task id.
//
// Needs github.com/rabbitmq/amqp091-go (`go get`, or Debian's golang-github-rabbitmq-amqp091-go-dev). Reads the
// worker's own variables: RABBITMQ_URL, or RABBITMQ_HOST, _PORT, _USER, _PASS and _VHOST; RABBITMQ_QUEUE. The third
// argument are more fields of `data`, as docs/fields.md lists them.
package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"strconv"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

type job struct {
	TaskID    string         `json:"task_id"`
	Type      string         `json:"type"`
	Data      map[string]any `json:"data"`
	CreatedAt string         `json:"created_at"`
}

func env(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}

func broker() (string, error) {
	if url := os.Getenv("RABBITMQ_URL"); url != "" {
		return url, nil
	}
	port, err := strconv.Atoi(env("RABBITMQ_PORT", "5672"))
	if err != nil {
		return "", fmt.Errorf("RABBITMQ_PORT: %w", err)
	}
	return amqp.URI{
		Scheme:   "amqp",
		Host:     env("RABBITMQ_HOST", "localhost"),
		Port:     port,
		Username: env("RABBITMQ_USER", "guest"),
		Password: env("RABBITMQ_PASS", "guest"),
		Vhost:    env("RABBITMQ_VHOST", "/"),
	}.String(), nil
}

// publish returns nil once the broker has the message on disk.
func publish(made job) error {
	queue := env("RABBITMQ_QUEUE", "image_generation")
	body, err := json.Marshal(made)
	if err != nil {
		return err
	}
	url, err := broker()
	if err != nil {
		return err
	}
	connection, err := amqp.Dial(url)
	if err != nil {
		return err
	}
	defer connection.Close()
	channel, err := connection.Channel()
	if err != nil {
		return err
	}
	// Durable and without arguments, as the worker declares it: RabbitMQ refuses any other declaration.
	if _, err := channel.QueueDeclare(queue, true, false, false, false, nil); err != nil {
		return err
	}
	if err := channel.Confirm(false); err != nil {
		return err
	}
	returns := channel.NotifyReturn(make(chan amqp.Return, 1))
	// The third is mandatory: a message that reaches no queue comes back instead of vanishing.
	confirm, err := channel.PublishWithDeferredConfirmWithContext(context.Background(), "", queue, true, false,
		amqp.Publishing{
			ContentType:  "application/json",
			DeliveryMode: amqp.Persistent,
			MessageId:    made.TaskID,
			Body:         body,
		})
	if err != nil {
		return err
	}
	if !confirm.Wait() {
		return fmt.Errorf("the broker refused the message")
	}
	select {
	case <-returns: // comes before the confirm
		return fmt.Errorf("there is no queue %s", queue)
	default:
		return nil
	}
}

func uuid4() (string, error) {
	bytes := make([]byte, 16)
	if _, err := rand.Read(bytes); err != nil {
		return "", err
	}
	bytes[6] = bytes[6]&0x0f | 0x40
	bytes[8] = bytes[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", bytes[:4], bytes[4:6], bytes[6:8], bytes[8:10], bytes[10:]), nil
}

func main() {
	log.SetFlags(0)
	// A number or text: it is told back as it is published.
	data := map[string]any{"generation_id": os.Args[1], "prompt": os.Args[2]}
	if number, err := strconv.ParseInt(os.Args[1], 10, 64); err == nil {
		data["generation_id"] = number
	}
	if len(os.Args) > 3 {
		decoder := json.NewDecoder(strings.NewReader(os.Args[3]))
		decoder.UseNumber() // a seed may be beyond what a float64 holds
		if err := decoder.Decode(&data); err != nil {
			log.Fatal(err)
		}
	}
	// Made and stored together with the generation: to publish a task again, even in doubt, does it only once.
	taskID, err := uuid4()
	if err != nil {
		log.Fatal(err)
	}
	made := job{taskID, "image_generation", data, time.Now().UTC().Format(time.RFC3339Nano)}
	if err := publish(made); err != nil {
		log.Fatal(err)
	}
	fmt.Println(made.TaskID)
}
